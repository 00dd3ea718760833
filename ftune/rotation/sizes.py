"""How much state the weights in some units have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ftune.plugin import StateBytes
from ftune.rotation.masters import is_short
from ftune.rotation.units import Unit


def state_bytes(weights: Iterable[Any], of: StateBytes, *, with_masters: bool) -> float:
    """Return the bytes of the optimizer's state of weights, and of their float32 copies where they have some."""
    total = 0.0
    for weight in weights:
        copied = with_masters and is_short(weight)
        total += of(weight, 4) + 4 * weight.numel() if copied else of(weight, weight.element_size())
    return total


def bytes_of_units(
    units: Iterable[Unit], trained: Sequence[Any], of: StateBytes, *, with_masters: bool = False
) -> list[float]:
    """Return the bytes of the state of each unit's trained weights."""
    known = {id(weight) for weight in trained}
    return [
        state_bytes([weight for weight in unit.weights if id(weight) in known], of, with_masters=with_masters)
        for unit in units
    ]
