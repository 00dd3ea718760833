"""The state of an optimizer whose weights are split: a file for each rank, which any number of ranks can go on from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ftune import plugin
from ftune.embeddings import of_model
from ftune.errors import Problem, RunError
from ftune.sharding.model import start_of

WHOLE = "optimizer.pt"
"""Of ranks that have whole weights: one file for all of them."""


def name_of(rank: int, ranks: int) -> str:
    """Return the name of a rank's file; of one that shares its weights with nobody, the whole's."""
    return WHOLE if ranks == 1 else f"optimizer-{rank:05d}-of-{ranks:05d}.pt"


def write_state(optimizer: torch.optim.Optimizer, folder: Path, *, rank: int, ranks: int) -> None:
    """Write what a rank holds of an optimizer's state; `ranks` share the weights."""
    torch.save(optimizer.state_dict(), folder / name_of(rank, ranks))


def read_state(
    optimizer: torch.optim.Optimizer, facts: plugin.Optimizer, folder: Path, *, rank: int, ranks: int, mapped: bool
) -> dict[str, Any]:
    """Return this rank's state from a checkpoint of any number of ranks, of which `ranks` share the weights now.

    Its tensors are on the host; `mapped` ones take no memory there. Raises RunError where it cannot be shared out anew.
    """
    files = _files(folder)
    if len(files) == ranks:
        return _load(files[rank], mapped=mapped)
    if not facts.state_follows_rows:
        what = f"{folder.name} was saved by {_told(len(files))}, and now there {'are' if ranks > 1 else 'is'} {ranks}"
        why = f"the blocks of {facts.name}'s 8-bit state are those of each rank's own rows"
        fix = f"go on with {len(files)} ranks and the same distributed.zero_stage, or start a new run"
        raise RunError(Problem("resume-state", what, why=why, fix=fix))
    return _shared_out(optimizer, facts, [_load(file, mapped=True) for file in files], rank=rank, ranks=ranks)


def _files(folder: Path) -> list[Path]:
    whole = folder / WHOLE
    return [whole] if whole.is_file() else sorted(folder.glob("optimizer-*-of-*.pt"))


def _load(file: Path, *, mapped: bool) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    return found


def _told(ranks: int) -> str:
    return "one process" if ranks == 1 else f"{ranks} ranks that shared the weights"


def _shared_out(
    optimizer: torch.optim.Optimizer, facts: plugin.Optimizer, parts: list[dict[str, Any]], *, rank: int, ranks: int
) -> dict[str, Any]:
    """Return a rank's part of a state that was split otherwise."""
    state: dict[int, dict[str, Any]] = {}
    for number, weight in _numbered(optimizer, parts[0]):
        shape = of_model(weight).shape
        entries = [part["state"][number] for part in parts if number in part["state"]]
        if not entries:
            continue
        first, end = (start_of(shape[0], each, ranks) for each in (rank, rank + 1))
        state[number] = {
            name: _rows([entry[name] for entry in entries], first, end)
            if _follows_rows(name, value, shape, facts)
            else value
            for name, value in entries[0].items()
        }
    return {**parts[0], "state": state}


def _numbered(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each weight with its number in a saved state."""
    for now, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        yield from zip(before["params"], now["params"], strict=True)


def _follows_rows(name: str, value: Any, shape: torch.Size, facts: plugin.Optimizer) -> bool:
    """Return whether a rank has of an entry what it has of the weight: everything but single numbers and what is the
    same for all rows of a matrix."""
    is_array = isinstance(value, torch.Tensor) and value.dim() > 0
    return is_array and not (len(shape) == 2 and name in facts.whole_state)


def _rows(parts: list[torch.Tensor], first: int, end: int) -> torch.Tensor:
    """Return some rows of a tensor that lies in parts."""
    chosen, start = [], 0
    for part in parts:
        low, high = max(first - start, 0), min(end - start, len(part))
        if low < high:
            chosen.append(part[low:high])
        start += len(part)
    # Copied: a part may be a file that is only mapped.
    return torch.cat(chosen) if chosen else parts[0][:0].clone()
