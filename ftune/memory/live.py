"""What is alive over a traced step, in few enough columns to be drawn: each shows its fullest instant."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ftune.memory.events import Owner, Trace

_COLUMNS = 800
_START = "start"
"""The phase of what is there when a step begins."""


@dataclass(frozen=True)
class Stretch:
    """Columns of one phase, from the first up to but not including the last."""

    phase: str
    first: int
    last: int


@dataclass(frozen=True)
class Live:
    """Bytes alive by owner, column by column; columns hold as many storages made and freed each."""

    by_owner: dict[Owner, tuple[int, ...]]
    stretches: tuple[Stretch, ...]

    @property
    def totals(self) -> tuple[int, ...]:
        return tuple(sum(column) for column in zip(*self.by_owner.values(), strict=True))


def live(trace: Trace, columns: int = _COLUMNS) -> Live:
    """Return what a step holds, from what is there when it begins."""
    held = dict.fromkeys(Owner, 0)
    changes = [event for event in trace.events if event.phase != _START]
    for event in trace.events:
        if event.phase == _START:
            held[event.owner] += event.size_bytes
    width = max(1, math.ceil(len(changes) / columns))
    found: list[dict[Owner, int]] = []
    phases: list[str] = []
    for start in range(0, len(changes), width):
        fullest, most = dict(held), sum(held.values()) if start == 0 else -1
        for event in changes[start : start + width]:
            held[event.owner] += event.size_bytes
            total = sum(held.values())
            if total > most:
                fullest, most = dict(held), total
        found.append(fullest)
        phases.append(changes[start].phase)
    by_owner = {owner: tuple(column[owner] for column in found) for owner in Owner}
    return Live(by_owner, tuple(_stretches(phases)))


def _stretches(phases: list[str]) -> list[Stretch]:
    borders = [0, *(place for place in range(1, len(phases)) if phases[place] != phases[place - 1]), len(phases)]
    return [Stretch(phases[first], first, last) for first, last in itertools.pairwise(borders) if last > first]
