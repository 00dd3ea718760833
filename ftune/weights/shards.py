"""Write weights as safetensors, one shard in memory at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from ftune.errors import Problem, RunError
from ftune.weights.files import NAMES

if TYPE_CHECKING:
    from ftune.weights.folded import Weights

INDEX = "model.safetensors.index.json"


def write_shards(weights: Weights, folder: Path, dtype: str, max_shard_size: str) -> None:
    """Write `model.safetensors`, or shards of at most that size with their index.

    Memory: one shard. Raises RunError where a weight does not fit the type's range.
    """
    wanted = NAMES[dtype]
    sizes = {name: math.prod(weights.shape(name)) * wanted.itemsize for name in weights.names()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for filename, names in split.filename_to_tensors.items():
        save_file(
            {name: in_range(weights.read(name), name, wanted) for name in names}, folder / filename, {"format": "pt"}
        )
    if split.is_sharded:
        total = sum(math.prod(weights.shape(name)) for name in sizes)
        index = {
            "metadata": {"total_parameters": total, **split.metadata},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def in_range(had: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight in another type; raises RunError where float16 cannot hold its numbers."""
    if not had.is_floating_point():
        return had.contiguous()
    made = had.to(dtype)
    if dtype is torch.float16 and had.dtype is not dtype and made.isinf().any() and not had.isinf().any():
        what = f"`{name}` holds numbers beyond what float16 can (65504)"
        raise RunError(Problem("dtype-range", what, fix="export in bfloat16, or in float32"))
    return made.contiguous()
