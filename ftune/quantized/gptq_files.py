"""Weights that GPTQ packages saved, read without them: their integers become codes as they are.

A layer is four tensors. `qweight` int32 (in * bits / 32, out) holds codes one after another along the inputs, lowest
bits first; 3 bits run on from one word into the next. `qzeros` int32 (groups, out * bits / 32) holds zero-points in the
same way along the outputs, each less 1 in format 1. `scales` is (groups, out), `g_idx` (in,) the group of each input.

    W = scale (Q - zero)  =  scale Q + offset,     offset = -scale zero
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ftune.errors import Problem, RecipeError
from ftune.quantized.codes import GroupCodes
from ftune.quantized.files import damaged_layer
from ftune.quantized.packing import PLANES

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def take_gptq(
    tensors: dict[str, torch.Tensor], settings: Mapping[str, Any]
) -> tuple[dict[str, GroupCodes], dict[str, torch.Tensor]]:
    """Return the codes of each layer in a GPTQ checkpoint, and the tensors that are no codes.

    `settings` is its quantization_config. Raises RecipeError for bits that ftune has no codes of.
    """
    bits = settings.get("bits")
    if bits not in PLANES:
        what = f"this GPTQ model has weights of {bits} bits"
        fix = "name one of them, or the unquantised model"
        raise RecipeError(Problem("gptq-format", what, why=f"ftune reads {', '.join(map(str, PLANES))}", fix=fix))
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    rest, layers = dict(tensors), {}
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        if missing := [part for part in _PARTS[:3] if f"{name}.{part}" not in rest]:
            raise damaged_layer(name, f"it has no {', '.join(missing)}")
        qweight, qzeros, scales = (rest.pop(f"{name}.{part}") for part in _PARTS[:3])
        layers[name] = _codes(qweight, qzeros, scales, rest.pop(f"{name}.g_idx", None), bits, less)
    return layers, rest


def _codes(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    index: torch.Tensor | None,
    bits: int,
    less: int,
) -> GroupCodes:
    codes = _read_along_rows(qweight.T.contiguous(), bits)
    zeros = (_read_along_rows(qzeros, bits).long() + less) & (2**bits - 1)
    # A scale of 0 says that the group is 0, which the smallest of all scales says as well.
    scale = scales.T.float().contiguous()
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).tiny, scale)
    offset = -scale * zeros.T
    columns, groups = codes.shape[1], scale.shape[1]
    consecutive = torch.arange(columns) // (columns // groups)
    kept = None if index is None or torch.equal(index.long(), consecutive) else index.long()
    if kept is not None and (torch.bincount(kept, minlength=groups) != columns // groups).any():
        what = "this GPTQ model has groups of unequal size"
        raise RecipeError(Problem("gptq-format", what, fix="name the unquantised model"))
    return GroupCodes.of(codes, scale, offset, bits, kept)


def _read_along_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the uint8 numbers (rows, words * 32 / bits) of int32 words (rows, words), read as one stream of bits."""
    stream = ((words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1).to(torch.uint8)
    numbers = stream.flatten(1).unflatten(1, (-1, bits))
    return sum(numbers[..., place] << place for place in range(bits))
