"""Load a model whose weights are codes on the disk already: ftune's own folders, and those of GPTQ and HQQ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ftune.models.quiet import quiet
from ftune.quantized.codes import GroupCodes
from ftune.quantized.gptq_files import take_gptq
from ftune.quantized.hqq_files import take_hqq
from ftune.quantized.kinds import GPTQ, HQQ, OWN, kind_of_codes
from ftune.quantized.model import put_codes
from ftune.quantized.saved import read_quantized
from ftune.recipe.schema import Model
from ftune.tensor_files import weight_files

Read = tuple[dict[str, GroupCodes], dict[str, torch.Tensor]]


_CODED = ("packed", "scale", "offset", "group_index")
"""What a layer in few bits has in the place of a weight."""


def load_codes(model: Model, folder: Path, config: Any) -> tuple[Any, dict[str, list[str]]] | None:
    """Return the model with its codes in place, and what did not fit; None where a folder has no codes.

    What did not fit is reported as transformers does: `missing_keys`, `unexpected_keys`.
    """
    settings = getattr(config, "quantization_config", None)
    kind = kind_of_codes(folder, settings)
    if kind is None:
        return None
    layers, rest = _READERS[kind](folder, settings)
    if settings is not None:
        del config.quantization_config
    loaded = _skeleton(model, config)
    put_codes(loaded, layers)
    with torch.no_grad():
        found = loaded.load_state_dict(rest, strict=False)
    loaded.tie_weights()
    put = {f"{name}.{part}" for name in layers for part in _CODED} | set(getattr(loaded, "all_tied_weights_keys", {}))
    missing = [key for key in found.missing_keys if key not in put]
    loaded.is_quantized = True  # so that methods that move the weights themselves refuse it
    report = {"missing_keys": missing, "unexpected_keys": list(found.unexpected_keys)}
    return loaded.eval(), {**report, "mismatched_keys": [], "error_msgs": []}


def _skeleton(model: Model, config: Any) -> Any:
    """Return the model without numbers in it: memory that nobody writes to is not taken."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    dtype = getattr(config, "dtype", None) if model.dtype == "auto" else getattr(torch, model.dtype)
    more = {} if model.attn_implementation == "auto" else {"attn_implementation": model.attn_implementation}
    with quiet(), no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code, **more)


def _own(folder: Path, settings: Mapping[str, Any]) -> Read:
    return read_quantized(folder)


def _gptq(folder: Path, settings: Mapping[str, Any]) -> Read:
    return take_gptq(_tensors(folder), settings)


def _hqq(folder: Path, settings: Any) -> Read:
    return take_hqq(_tensors(folder))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = {}
    for path in weight_files(folder):
        tensors |= load_file(path)
    return tensors


_READERS: dict[str, Callable[[Path, Any], Read]] = {OWN: _own, GPTQ: _gptq, HQQ: _hqq}
"""By the kind of codes."""
