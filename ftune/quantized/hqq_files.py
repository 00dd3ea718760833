"""Weights that HQQ packages saved, read without them: their integers become codes as they are.

A layer is `W_q` and what describes it: `shape` (out, in), `group_size`, `nbits`, `axis`, `packing` (a word, one letter
a byte), `scale` and `zero`, one number a group. With axis 1 the weight is cut into rows of one group each,
(out * in / group_size, group_size), and W_q packs n of these rows into one: its row i of m holds the rows i, m + i,
2m + i, ..., the first in the highest bits. 3 bits go ten to an int32, its two highest bits unused, rows of 0 filling up
the last. With `view_as_float` the same bytes are called numbers of the compute dtype.

    W = (Q - zero) scale  =  scale Q + offset,     offset = -scale zero
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ftune.errors import Problem, RecipeError
from ftune.quantized.codes import GroupCodes
from ftune.quantized.files import damaged_layer

_PACKINGS = {
    2: ("2bit_u8", torch.uint8, 4),
    3: ("3bit_32", torch.int32, 10),
    4: ("4bit_u8", torch.uint8, 2),
    8: ("8bit_u8", torch.uint8, 1),
}
"""For each number of bits its packing: name, words, and codes in a word."""
_NEEDED = ("W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing")
_QUANTISED = ("quant_scale", "quant_zero")
_SAYS_NO_MORE = (
    *("view_as_float", "unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
"""How the codes were found and are computed with, which neither tells what they are."""


def take_hqq(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, GroupCodes], dict[str, torch.Tensor]]:
    """Return the codes of each layer in an HQQ checkpoint, and the tensors that are no codes.

    Raises RecipeError for codes that ftune has no place for, and RunError for a layer that is not whole.
    """
    rest, layers = dict(tensors), {}
    for name in [key.removesuffix(".W_q") for key in tensors if key.endswith(".W_q")]:
        held = {part: rest.pop(key) for part in _NEEDED + _QUANTISED if (key := f"{name}.{part}") in rest}
        for part in _SAYS_NO_MORE:
            rest.pop(f"{name}.{part}", None)
        layers[name] = _codes(name, held)
    return layers, rest


def _codes(name: str, held: dict[str, torch.Tensor]) -> GroupCodes:
    if missing := [part for part in _NEEDED if part not in held]:
        raise damaged_layer(name, f"it has no {', '.join(missing)}")
    (bits,) = _numbers(name, held, "nbits", 1, whole=False)  # hqq has 1.58 bits too
    (group_size,), (axis,) = (_numbers(name, held, part, 1) for part in ("group_size", "axis"))
    rows, columns = _numbers(name, held, "shape", 2)
    if min(rows, columns, group_size) < 1:
        raise damaged_layer(name, f"it is a weight of {(rows, columns)} in groups of {group_size}")
    _require_groups_of_inputs(name, held, bits, (rows, columns), group_size, axis)
    groups = rows * columns // group_size
    scale, zero = (_number_a_group(name, part, held[part], groups).view(rows, -1) for part in ("scale", "zero"))
    codes = _unpacked(name, held, int(bits), groups, group_size)
    return GroupCodes.of(codes.view(rows, columns), scale, -scale * zero, int(bits))


def _numbers(name: str, held: dict[str, torch.Tensor], part: str, count: int, *, whole: bool = True) -> list[Any]:
    numbers = held[part]
    if numbers.numel() != count or numbers.is_complex() or (whole and numbers.is_floating_point()):
        raise damaged_layer(name, f"its {part} is {_spoken(numbers)}")
    return numbers.flatten().tolist()


def _require_groups_of_inputs(
    name: str, held: dict[str, torch.Tensor], bits: float, shape: tuple[int, int], group_size: int, axis: int
) -> None:
    """Refuse what is no layer of codes with a scale and an offset for each output and group of inputs."""
    again = f"quantise the model again with axis=1 (HqqConfig(nbits={bits:g}, group_size={group_size}, axis=1))"
    what, why, fix = f"`{name}` of this HQQ model ", "", again
    if bits not in _PACKINGS:
        what += f"has weights of {bits:g} bits"
        why, fix = f"ftune reads {', '.join(map(str, _PACKINGS))}", "quantise the model again in one of them"
    elif axis != 1:
        what += f"has groups along its outputs (axis {axis})"
        why = "there several outputs share the zero of one input: no adapter merges by shifting it, since that moves "
        why += "the weights of all of them by the same number"
    elif shape[1] % group_size:
        what += f"has groups of {group_size} that run on from one output into the next"
        why = f"{shape[1]} inputs are no whole number of them, and such a group cannot be shifted for one output alone"
        fitting = [size for size in (8, 16, 32, 64, 128) if shape[1] % size == 0]
        fix = f"quantise the model again with a group_size of {', '.join(map(str, fitting))}" if fitting else ""
    elif any(part in held and held[part].any() for part in _QUANTISED):
        what += "has scales or zeros that are quantised themselves"
        fix = "quantise the model again without quant_zero and quant_scale, which hqq no longer has either"
    else:
        return
    fix = f"{fix}, or name the unquantised model" if fix else "name the unquantised model"
    raise RecipeError(Problem("hqq-format", what, why=why, fix=fix))


def _number_a_group(name: str, part: str, numbers: torch.Tensor, groups: int) -> torch.Tensor:
    if not numbers.is_floating_point() or numbers.numel() != groups:
        raise damaged_layer(name, f"its {part} is {_spoken(numbers)}, where {groups} groups need a number each")
    numbers = numbers.float()
    if not numbers.isfinite().all() or (part == "scale" and not numbers.all()):
        raise damaged_layer(name, f"a {part} of it is 0 or no number")
    return numbers


def _unpacked(name: str, held: dict[str, torch.Tensor], bits: int, groups: int, group_size: int) -> torch.Tensor:
    """Return the uint8 codes (groups, group_size)."""
    packing, dtype, codes_a_word = _PACKINGS[bits]
    letters = held["packing"].flatten()
    said = bytes(letters.tolist()).decode("ascii", "replace") if letters.dtype == torch.uint8 else _spoken(letters)
    if said != packing:
        raise damaged_layer(name, f"its {bits} bits are packed as {said}, where hqq packs them as {packing}")
    stored, word_rows = held["W_q"], math.ceil(groups / codes_a_word)
    if stored.nbytes != word_rows * group_size * dtype.itemsize or not (
        stored.is_floating_point() or stored.dtype == dtype
    ):
        needs = f"{groups} groups of {group_size} codes need {word_rows} rows of {dtype}".replace("torch.", "")
        raise damaged_layer(name, f"its W_q is {_spoken(stored)}, and {needs}")
    words = stored.flatten().view(dtype).view(word_rows, group_size)
    shifts = range(bits * (codes_a_word - 1), -1, -bits)
    rows = torch.cat([((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts])
    return rows[:groups]


def _spoken(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
