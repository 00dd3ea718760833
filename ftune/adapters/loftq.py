"""LoftQ (Li et al., 2023, arXiv 2310.08659): the adapter starts with what quantising took from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftune.adapters.bits import dequantised_weight, is_quantised
from ftune.errors import Problem, RecipeError
from ftune.tensor_files import Stored, stored_in


def start(adapted: Any) -> None:
    """Set s B A of each quantised layer to the closest matrix of rank r to W - dequantised(Q), by its SVD.

    One round of the paper's alternation. More of them would quantise other weights than the model's own, and the
    adapter would fit no base but the one it was made with.
    """
    from peft.tuners.lora import LoraLayer

    folder = Path(adapted.get_base_model().weights_folder)
    stored = stored_in(folder)
    prefix = adapted.get_base_model().base_model_prefix
    for name, module in adapted.named_modules():
        if not isinstance(module, LoraLayer) or not is_quantised(module.get_base_layer()):
            continue
        plain = _read(stored, name.removeprefix("base_model.model.") + ".weight", prefix, folder)
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


def _read(stored: Mapping[str, Stored], name: str, prefix: str, folder: Path) -> torch.Tensor:
    from safetensors import safe_open

    for wanted in (name, name.removeprefix(prefix + ".")):
        if wanted in stored:
            with safe_open(stored[wanted].path, framework="pt") as tensors:
                return tensors.get_tensor(wanted)
    what = f"LoftQ finds no weights `{name}` in `{folder}`"
    why = "it compares the quantised weights with those of the safetensors files, under the model's own names"
    raise RecipeError(Problem("loftq-weights", what, why=why, fix="set init_lora_weights: true"))
