"""The cheapest set of changes with which a recipe fits, found in few traces.

Micro-batches of one set of changes are halved to the largest that fits: with more rows a step holds more, and takes no
longer for the same batch. Sets that give up nothing are tried before those that take an allowance, and a set is left
out where its weights, gradients and state alone are too large, or where no micro-batch of it could be the fastest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftune.errors import RunError
from ftune.memory.changes import Option, Situation, combinations, same_batch, settings_with
from ftune.memory.plan import MemoryPlan
from ftune.resolve import RunSpec
from ftune.units import format_bytes

_AS_FAST = 1.05
"""Times that differ by less are not told apart by a model of time: the recipe with fewer changes is taken."""
_EACH_PASS = 0.002
"""Part by which a further pass is taken to slow a step where nothing can be timed."""
_SPENT = "not looked at: enough was tried"


@dataclass(frozen=True)
class Candidate:
    """A recipe with changes that the rules accept."""

    settings: Mapping[str, Any]
    text: str
    spec: RunSpec


@dataclass(frozen=True)
class Refused:
    """A recipe with changes that are none."""

    reason: str
    """Names of rules, or what went wrong."""


@dataclass(frozen=True)
class Tried:
    """A candidate that was planned."""

    options: tuple[Option, ...]
    rows: int
    candidate: Candidate
    plan: MemoryPlan
    num_changes: int
    cost: float
    """Seconds for each token; where nothing can be timed, a number that only says what is slower."""

    def fits(self, comfortable: bool) -> bool:
        """Return whether it fits, with a margin if asked."""
        return bool(self.plan.fits) and not (comfortable and self.plan.is_tight)


@dataclass(frozen=True)
class Left:
    """A set of changes that was not planned, or not with all micro-batches, and why."""

    options: tuple[Option, ...]
    rows: int | None
    reason: str


@dataclass(frozen=True)
class Room:
    """What the device leaves for a run's tensors: less where it is to be comfortable."""

    tight_bytes: int
    comfortable_bytes: int


Build = Callable[[Mapping[str, Any]], Candidate | Refused]
PlanOf = Callable[[RunSpec], MemoryPlan]


class Search:
    """One search; what was planned is kept, and planned once.

    Where it may make only so many plans, it ends with the best of what was planned until then.
    """

    def __init__(
        self,
        situation: Situation,
        build: Build,
        plan_of: PlanOf,
        bound_of: Callable[[RunSpec], int],
        room: Room,
        most_plans: int | None = None,
    ) -> None:
        self.situation = situation
        self.rows = same_batch(situation)
        self.tried: dict[tuple[str, int], Tried] = {}
        self.left: dict[tuple[str, int | None], Left] = {}
        self.bound_of = bound_of
        self._build, self._plan_of, self._room = build, plan_of, room
        self._built: dict[tuple[str, int], Candidate | Refused] = {}
        self._plans: dict[str, MemoryPlan] = {}
        self._most_plans = math.inf if most_plans is None else most_plans

    def run(self) -> Tried | None:
        """Return what to take: a comfortable set of changes, else a tight one; None where nothing fits."""
        sets = combinations(self.situation)
        tiers = sorted({_gives_up(options) for options in sets})
        for comfortable in (True, False):
            for tier in tiers:
                found = self._of_tier([options for options in sets if _gives_up(options) == tier], comfortable)
                if found:
                    return best(found)
        return None

    def unchanged(self) -> Tried | None:
        """Return the largest micro-batch that fits without any other change; None where not one row does."""
        return self._fitting((), True, math.inf) or self._fitting((), False, math.inf)

    def candidate(self, options: tuple[Option, ...], rows: int) -> Candidate | Refused:
        """Return the recipe with changes, or why it is none."""
        key = (_key(options), rows)
        if key not in self._built:
            self._built[key] = self._build(settings_with(self.situation, options, rows))
        return self._built[key]

    def evaluate(self, options: tuple[Option, ...], rows: int) -> Tried | None:
        """Return a plan of the recipe with changes; None where it is no recipe, or cannot be traced."""
        key = (_key(options), rows)
        if key in self.tried:
            return self.tried[key]
        candidate = self.candidate(options, rows)
        plan = candidate if isinstance(candidate, Refused) else self._plan_or_why(candidate.spec)
        if isinstance(plan, Refused) or isinstance(candidate, Refused):
            self.left[key] = Left(options, rows, plan.reason if isinstance(plan, Refused) else "")
            return None
        changed = len(options) + (rows != self.situation.decided.training.rows_at_once)
        cost = _seconds_per_token(plan) or self._declared_cost(options, rows)
        self.tried[key] = Tried(options, rows, candidate, plan, changed, cost)
        return self.tried[key]

    def plan(self, spec: RunSpec) -> MemoryPlan:
        """Return the plan of a recipe; raises RunError where it cannot be traced."""
        key = repr(spec.recipe.as_dict())
        if key not in self._plans:
            self._plans[key] = self._plan_of(spec)
        return self._plans[key]

    def _plan_or_why(self, spec: RunSpec) -> MemoryPlan | Refused:
        if self.is_spent and repr(spec.recipe.as_dict()) not in self._plans:
            return Refused(_SPENT)
        try:
            return self.plan(spec)
        except RunError as error:
            return Refused(error.problems[0].what)

    @property
    def is_spent(self) -> bool:
        """Return whether no further plan may be made."""
        return len(self._plans) >= self._most_plans

    def _of_tier(self, sets: list[tuple[Option, ...]], comfortable: bool) -> list[Tried]:
        found: list[Tried] = []
        whole: set[str] = set()
        for options in sorted(sets, key=lambda options: (_slower(options), len(options))):
            if any(_key(parent) in whole for parent in _faster_parents(options)):
                reason = "slower than the same without, which fits as one batch"
                self.left[_key(options), None] = Left(options, None, reason)
                continue
            more = self._of_set(options, comfortable, min((tried.cost for tried in found), default=math.inf))
            if more and more[0].rows == self.rows[0]:
                whole.add(_key(options))
            found += more
        return found

    def _of_set(self, options: tuple[Option, ...], comfortable: bool, beat: float) -> list[Tried]:
        """Return the largest micro-batch that fits, and the recipe's own where that fits too."""
        first = self._fitting(options, comfortable, beat)
        if first is None or first.cost > beat * _AS_FAST:
            return [first] if first else []
        own = self.situation.decided.training.rows_at_once
        second = self.evaluate(options, own) if own < first.rows else None
        return [first, second] if second is not None and second.fits(comfortable) else [first]

    def _fitting(self, options: tuple[Option, ...], comfortable: bool, beat: float) -> Tried | None:
        """Return the largest micro-batch that fits; None where none does, or none could be as fast as what fits."""
        if self.is_spent and not any(_key(options) == key for key, _ in self.tried):
            self.left[_key(options), None] = Left(options, None, _SPENT)
            return None
        rows = []
        for count in self.rows:
            candidate = self.candidate(options, count)
            if isinstance(candidate, Refused):
                self.left[_key(options), count] = Left(options, count, candidate.reason)
            else:
                rows.append(count)
        if not rows:
            return None
        reason = self._hopeless(options, rows[0], beat, comfortable)
        if reason:
            self.left[_key(options), None] = Left(options, None, reason)
            return None
        first = self.evaluate(options, rows[0])
        if first is None or first.fits(comfortable):
            return first
        if first.cost > beat * _AS_FAST:
            self.left[_key(options), None] = Left(options, None, "slower than what fits")
            return None
        return self._largest(options, rows[1:], comfortable)

    def _largest(self, options: tuple[Option, ...], rows: list[int], comfortable: bool) -> Tried | None:
        """Return the largest micro-batch that fits, found by halving; `rows` come with the largest first."""
        found = self.evaluate(options, rows[-1]) if rows else None
        if found is None or not found.fits(comfortable):
            return None
        low, high = 0, len(rows) - 1
        while low < high:
            middle = (low + high) // 2
            tried = self.evaluate(options, rows[middle])
            if tried is not None and tried.fits(comfortable):
                found, high = tried, middle
            else:
                low = middle + 1
        return found

    def _hopeless(self, options: tuple[Option, ...], rows: int, beat: float, comfortable: bool) -> str:
        """Return why a set need not be traced."""
        candidate = self.candidate(options, rows)
        assert isinstance(candidate, Candidate)
        bound = self.bound_of(candidate.spec)
        if bound > (self._room.comfortable_bytes if comfortable else self._room.tight_bytes):
            return f"weights, gradients and optimizer state alone take {format_bytes(bound)}"
        times = [tried for tried in self.tried.values() if tried.plan.seconds_per_step is not None]
        if not times and self._declared_cost(options, rows) > beat * _AS_FAST:
            return "slower than what fits"
        return ""

    def _declared_cost(self, options: tuple[Option, ...], rows: int) -> float:
        return _slower(options) * (1 + _EACH_PASS * (self.rows[0] // rows - 1))


def best(found: list[Tried]) -> Tried:
    """Return the fastest; among those as fast, the one with the fewest changes."""
    fastest = min(tried.cost for tried in found)
    near = [tried for tried in found if tried.cost <= fastest * _AS_FAST]
    return min(near, key=lambda tried: (tried.num_changes, tried.cost, -tried.rows))


def _seconds_per_token(plan: MemoryPlan) -> float | None:
    return plan.seconds_per_step / plan.tokens_per_step if plan.seconds_per_step else None


def _gives_up(options: tuple[Option, ...]) -> int:
    return sum(option.gives_up for option in options)


def _slower(options: tuple[Option, ...]) -> float:
    return math.prod(option.slower for option in options)


def _faster_parents(options: tuple[Option, ...]) -> list[tuple[Option, ...]]:
    """Return the sets without one of the options that never make a step faster."""
    return [tuple(kept for kept in options if kept is not option) for option in options if option.never_faster]


def _key(options: tuple[Option, ...]) -> str:
    return repr([(option.row, option.settings, option.with_several_passes) for option in options])
