"""Which units move at which step.

Chance comes from generators of the plan's own, seeded by the run's seed and the number of the draw: the same on every
rank, untouched by dropout or data, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class Plan(ABC):
    """Which units, by number, move at the coming step; everything in it goes into checkpoints."""

    active: tuple[int, ...]
    """The units that the coming step moves."""

    @property
    @abstractmethod
    def sets(self) -> list[tuple[int, ...]]:
        """Sets of units that may move together: every one, or one that stands for those that chance may draw."""

    @abstractmethod
    def advance(self) -> None:
        """Go on to the next step."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return numbers and lists of numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where a plan of the same settings was."""


def shuffled(count: int, *, seed: int, draw: int = 0) -> list[int]:
    """Return 0 .. count-1 in an order that only the seed and the number of the draw determine."""
    return _generator(seed, draw).sample(range(count), count)


class Turns(Plan):
    """Sets of units take turns, each for `interval` steps, in the order given or in a new one for each sweep."""

    def __init__(self, sets: Sequence[tuple[int, ...]], *, interval: int = 1, seed: int | None = None) -> None:
        self._sets, self._interval, self._seed = list(sets), interval, seed
        self._sweep, self._turn, self._step = 0, 0, 0
        self._order = self._ordered()

    @property
    def active(self) -> tuple[int, ...]:  # type: ignore[override]
        return self._sets[self._order[self._turn]]

    @property
    def sets(self) -> list[tuple[int, ...]]:
        return list(self._sets)

    def advance(self) -> None:
        self._step += 1
        if self._step == self._interval:
            self._step, self._turn = 0, self._turn + 1
        if self._turn == len(self._order):
            self._turn, self._sweep = 0, self._sweep + 1
            self._order = self._ordered()

    def _ordered(self) -> list[int]:
        if self._seed is None:
            return list(range(len(self._sets)))
        return shuffled(len(self._sets), seed=self._seed, draw=self._sweep)

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self._order), "sweep": self._sweep, "turn": self._turn, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order = list(state["order"])
        self._sweep, self._turn, self._step = state["sweep"], state["turn"], state["step"]


class Draws(Plan):
    """Some units move at every step, and beside them `count` others, drawn anew every `interval` steps."""

    def __init__(self, always: Sequence[int], others: Sequence[int], *, count: int, interval: int, seed: int) -> None:
        self._always, self._others = tuple(always), tuple(others)
        self._count, self._interval, self._seed = count, interval, seed
        self._draw, self._step = 0, 0
        self._drawn = self._new_draw()

    @property
    def active(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(sorted((*self._always, *self._drawn)))

    @property
    def sets(self) -> list[tuple[int, ...]]:
        return [tuple(sorted((*self._always, *self._others[: self._count])))]

    def advance(self) -> None:
        self._step += 1
        if self._step == self._interval:
            self._step, self._draw = 0, self._draw + 1
            self._drawn = self._new_draw()

    def _new_draw(self) -> list[int]:
        return _generator(self._seed, self._draw).sample(self._others, self._count)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": list(self._drawn), "draw": self._draw, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn, self._draw, self._step = list(state["drawn"]), state["draw"], state["step"]


def _generator(seed: int, draw: int) -> random.Random:
    # Apart by more than any run draws, so that neighbouring seeds share no draw.
    return random.Random(seed * 2**32 + draw)
