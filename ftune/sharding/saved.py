"""Weights of a checkpoint, which lie whole in its files, put into a model of which each rank has its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from ftune.sharding.model import fill


def saved_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of a folder's weight files with its name, one in memory at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file is no mapping
                yield name, file.get_tensor(name)


def fill_from(saved: Iterator[tuple[str, torch.Tensor]], named: Mapping[str, torch.Tensor]) -> None:
    """Write saved tensors into the weights of their names; raises ValueError where a trained one is not among them."""
    filled = set()
    for name, values in saved:
        if name in named:
            fill(named[name], values)
            filled.add(id(named[name]))  # a tied weight is saved once and has two names
    missing = [name for name, weight in named.items() if weight.requires_grad and id(weight) not in filled]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}")
