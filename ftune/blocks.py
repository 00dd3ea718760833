"""The list of layers that a model is mostly made of, found in its module tree."""

from __future__ import annotations

from typing import Any

import torch

from ftune.errors import Problem, RecipeError


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """Return the blocks of the list that holds most elements: experts and branches are lists within its blocks."""
    found: list[torch.nn.Module] = []
    largest = 0
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            size = sum(weight.numel() for weight in module.parameters())
            if size > largest:
                found, largest = [block for block in module if any(True for _ in block.parameters())], size
    if not found:
        what = f"the layers of a {type(model).__name__} are not found"
        why = "looked for a torch.nn.ModuleList of blocks with weights; what was asked for goes from block to block"
        fix = "set tuning.method: full or lora, and distributed.zero_stage: 0"
        raise RecipeError(Problem("layers-not-found", what, why=why, fix=fix))
    return found
