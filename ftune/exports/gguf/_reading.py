"""The model again from a GGUF file: by transformers' own reader, or layer by layer where it does not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from ftune.exports.gguf import _architecture
from ftune.exports.gguf._writing import path_in
from ftune.models import gguf
from ftune.weights.layerwise import computing as computing_layerwise
from ftune.weights.skeleton import skeleton
from ftune.weights.written import require_equal

_BLOCK = 32
"""Weights of a row that share a scale in Q8_0."""


@contextlib.contextmanager
def computing(source: Any, folder: Path) -> Iterator[tuple[Any, str]]:
    """Yield the model as the file says, in float32."""
    path = path_in(folder)
    if source.fits and not _has_biases(source):
        model, _ = gguf.read_model(path)
        _stretch(model, path)
        yield model.eval(), "in memory"
        return
    with computing_layerwise(_Read(path, str(source.folder))) as model:
        yield model, "layer by layer"


def _has_biases(source: Any) -> bool:
    """Return whether a Llama has biases, which llama.cpp takes and transformers' reader leaves out."""
    config = _architecture.config_of(source)
    return bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))


def _stretch(model: Any, path: Path) -> None:
    """Divide the rotary frequencies as the file says and llama.cpp does: transformers' reader passes over it."""
    reader = GGUFReader(path)
    factor = next((field.contents() for name, field in reader.fields.items() if name.endswith("scaling.factor")), 1.0)
    each = [torch.from_numpy(np.array(one.data)) for one in reader.tensors if one.name == _architecture.ROPE_FACTORS]
    model.model.rotary_emb.inv_freq /= each[0] if each else factor


def check_rounding(source: Any, folder: Path) -> None:
    """Raise RunError where a weight in the file is farther from the whole one than rounding to nearest takes it."""
    read = _Read(path_in(folder), str(source.folder))
    for name in source.weights.names():
        whole = source.weights.read(name).float()
        # What is left beyond the rounding of each weight has to be nothing.
        beyond = (read.stored(name) - whole).abs() - _largest_error(whole, read.kind(name))
        require_equal(name, beyond.clamp(min=0), torch.zeros_like(whole))


def _largest_error(whole: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """Return how far rounding may take each weight, beside half of float16's smallest number where that is stored."""
    if kind is GGMLQuantizationType.Q8_0:  # codes from -127 to 127 times the block's scale, which is float16
        scale = whole.reshape(-1, _BLOCK).abs().amax(dim=1, keepdim=True) / 127
        # One part in a million for the float32 in which the codes are found.
        each = scale * (0.5 + 1e-6) + 127 * (scale * 2**-11 + 2**-25)
        return each.expand(-1, _BLOCK).reshape(whole.shape)
    if kind is GGMLQuantizationType.F16:
        return whole.abs() * 2**-11 + 2**-25
    return whole.abs() * 2**-8 if kind is GGMLQuantizationType.BF16 else torch.zeros_like(whole)


class _Read:
    """The weights of a file, dequantised when they are asked for."""

    def __init__(self, path: Path, folder: str) -> None:
        self.model = self.adapted = skeleton(folder)
        self.parts: dict[str, Any] = {}
        self._tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    @cached_property
    def _names(self) -> Any:
        return _architecture.names_of(self.model.config)

    def part_of(self, _name: str) -> None:
        return None

    def kind(self, name: str) -> GGMLQuantizationType:
        """Return how a weight is stored."""
        return self._found(name).tensor_type

    def _found(self, name: str) -> Any:
        key = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if key not in self._tensors:
            key = self._names.get_name("model.embed_tokens.weight", try_suffixes=(".weight",))  # the output is tied
        return self._tensors[key]

    def stored(self, name: str) -> torch.Tensor:
        found = self._found(name)
        value = torch.from_numpy(np.array(dequantize(found.data, found.tensor_type), dtype=np.float32))
        return _architecture.rearranged(value, name, self.model.config, back=True)
