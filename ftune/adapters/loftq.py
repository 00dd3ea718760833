"""LoftQ (Li et al., 2023, arXiv 2310.08659): the adapter starts with what quantising took from the weights."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from ftune.adapters.bits import dequantised_weight, is_quantised
from ftune.errors import Problem, RecipeError


def start(adapted: Any) -> None:
    """Set s B A of each quantised layer to the closest matrix of rank r to W - dequantised(Q), by its SVD.

    One round of the paper's alternation. More of them would quantise other weights than the model's own, and the
    adapter would fit no base but the one it was made with.
    """
    from peft.tuners.lora import LoraLayer

    folder = Path(adapted.get_base_model().weights_folder)
    where = _tensor_files(folder)
    prefix = adapted.get_base_model().base_model_prefix
    for name, module in adapted.named_modules():
        if not isinstance(module, LoraLayer) or not is_quantised(module.get_base_layer()):
            continue
        plain = _read(where, name.removeprefix("base_model.model.") + ".weight", prefix, folder)
        held = dequantised_weight(module.get_base_layer())
        for adapter, scale in module.scaling.items():
            left, right = _low_rank(plain.to(held) - held, module.r[adapter])
            module.lora_A[adapter].weight.data = (right / scale**0.5).contiguous()
            module.lora_B[adapter].weight.data = (left / scale**0.5).contiguous()


def _low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, r) and (r, in) whose product is the closest of that rank, the singular values shared evenly."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return which safetensors file of a folder holds each tensor."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in named.items()}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), path)
    return found


def _read(where: dict[str, Path], name: str, prefix: str, folder: Path) -> torch.Tensor:
    from safetensors import safe_open

    for wanted in (name, name.removeprefix(prefix + ".")):
        with contextlib.suppress(KeyError), safe_open(where[wanted], framework="pt") as tensors:
            return tensors.get_tensor(wanted)
    what = f"LoftQ finds no weights `{name}` in `{folder}`"
    why = "it compares the quantised weights with those of the safetensors files, under the model's own names"
    raise RecipeError(Problem("loftq-weights", what, why=why, fix="set init_lora_weights: true"))
