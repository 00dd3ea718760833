"""`ftune plan --fit`: the changes with which a recipe fits on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftune.errors import Problem, RecipeError
from ftune.machine import Machine
from ftune.memory.ask import config_of_model, machine_with, plan_of, plannable
from ftune.memory.bounds import Bounds
from ftune.memory.candidates import room_of, search_of
from ftune.memory.changes import ROWS, Option, Situation, allowable, check_allowed, settings_with
from ftune.memory.plan import MemoryPlan
from ftune.memory.search import Candidate, Left, Room, Search, Tried
from ftune.memory.source_text import written_out
from ftune.memory.tracer import kept_tracer
from ftune.recipe import Loaded
from ftune.recipe.edits import REMOVED, value_at
from ftune.resolve import RunSpec, resolve


@dataclasses.dataclass(frozen=True)
class Change:
    """One key that is changed."""

    key: str
    before: Any
    after: Any
    saves_bytes: int
    """By how much what is needed at the least falls with this change, after those before it; below 0 where it rises."""
    costs: str

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Fit:
    """What was found."""

    before: Tried
    """The recipe as it is."""
    after: Tried
    """What fits; where nothing does, what comes nearest."""
    fits: bool
    changes: tuple[Change, ...]
    """What is changed from the one to the other."""
    tried: tuple[Tried, ...]
    left: tuple[Left, ...]
    buys: tuple[tuple[str, int], ...]
    """Where nothing fits: what could be allowed with which it might, and the bytes that it takes in any case."""
    problems: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the answer of `plan --fit --json`: the plan with the changes, and what they are."""
        return {
            **self.after.plan.as_json(),
            "changes": [change.as_json() for change in self.changes],
            "unchanged": {"peak_bytes": self.before.plan.peak_bytes, "fits": self.before.plan.fits},
        }


def fit(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    gpu: str | None = None,
    allow: Iterable[str] = (),
    timeout_seconds: float | None = None,
) -> Fit:
    """Search the cheapest changes with which a recipe fits; raises RecipeError, MachineError and RunError.

    `allow` names what may be given up: optimizers, tunings, `bfloat16`, `max_length`.
    """
    allowed = check_allowed(allow)
    machine, facts = machine_with(gpu)
    loaded, problems = plannable(recipe, overrides, machine)
    loaded = written_out(loaded)
    spec = resolve(loaded, machine, fingerprints=False)
    room = room_of(facts, machine)
    config = config_of_model(spec.recipe.model)

    def plan(one: RunSpec) -> MemoryPlan:
        return plan_of(one, config, facts, machine)

    with kept_tracer(timeout_seconds):
        return searched(loaded, machine, allowed, plan, Bounds(config), room, problems)


def searched(
    loaded: Loaded,
    machine: Machine,
    allowed: frozenset[str],
    plan: Callable[[RunSpec], MemoryPlan],
    bounds: Bounds,
    room: Room,
    problems: Iterable[Problem] = (),
    *,
    most_plans: int | None = None,
) -> Fit:
    """Return what a search finds with a function that plans a recipe; with so many plans at the most, or with all."""
    search = search_of(loaded, machine, allowed, plan, bounds, room, most_plans)
    situation = search.situation
    decided = situation.decided
    first = search.candidate((), decided.training.rows_at_once)
    assert isinstance(first, Candidate)
    search.plan(first.spec)  # raises what is wrong with the recipe itself
    before = search.evaluate((), decided.training.rows_at_once)
    assert before is not None
    found = search.run()
    after = found or min(search.tried.values(), key=lambda tried: (tried.plan.peak_bytes, tried.num_changes))
    changes = _changes(search, situation, before, after)
    buys = () if found else _buys(search, room.tight_bytes)
    tried, left = tuple(search.tried.values()), tuple(search.left.values())
    return Fit(before, after, found is not None, changes, tried, left, buys, tuple(problems))


def write(found: Fit, path: Path) -> None:
    """Write the recipe with the changes; raises RecipeError where a file is there already."""
    if path.exists():
        raise RecipeError(Problem("output-exists", f"`{path}` exists already", fix="name another file with --write"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(found.after.candidate.text.encode())


def _changes(search: Search, situation: Situation, before: Tried, after: Tried) -> tuple[Change, ...]:
    """Return the changed keys; what each set of keys saves is told by making one change after the other."""
    found: list[Change] = []
    had = before.plan.peak_bytes
    own = before.rows
    told: dict[str, Any] = {}
    steps: list[tuple[tuple[Option, ...], int, str]] = [
        (after.options[: count + 1], own, option.costs) for count, option in enumerate(after.options)
    ]
    if after.rows != own:
        steps.append((after.options, after.rows, _batch_costs(own, after.rows)))
    pending: list[tuple[str, Any, str]] = []
    for number, (options, rows, costs) in enumerate(steps):
        settings = settings_with(situation, options, rows)
        pending += [(key, value, costs) for key, value in settings.items() if told.get(key, told) != value]
        told |= settings
        tried = after if number == len(steps) - 1 else search.evaluate(options, rows)
        if tried is None:
            continue  # no recipe by itself: what it saves is told with the next
        saved = had - tried.plan.peak_bytes
        had = tried.plan.peak_bytes
        for key, value, said in pending:
            found.append(Change(key, _before(situation, key), None if value is REMOVED else value, saved, said))
            saved = 0
        pending = []
    # A key that two changes set is told once, as it is in the end.
    last = {change.key: change for change in found}
    saves = {key: sum(change.saves_bytes for change in found if change.key == key) for key in last}
    final = after.candidate.settings
    return tuple(dataclasses.replace(change, saves_bytes=saves[key]) for key, change in last.items() if key in final)


def _before(situation: Situation, key: str) -> Any:
    """Return what a key was: as decided, or as written where it is a whole section."""
    section, _, name = key.partition(".")
    if not name:
        return dict(situation.given(section))
    return value_at(situation.decided.as_dict(), key.split("."))


def _batch_costs(before: int, after: int) -> str:
    if after > before:
        return "nothing: fewer passes add up to the same batch, and more memory is used"
    return "time: more passes add up to the same batch; the same numbers but for rounding"


def _buys(search: Search, capacity: int) -> tuple[tuple[str, int], ...]:
    """Return what else could be allowed, by what its weights, gradients and state take in any case."""
    situation = search.situation
    found: dict[str, int] = {}
    for name in allowable():
        if name in situation.allowed or name == "max_length":
            continue
        offered = dataclasses.replace(situation, allowed=frozenset({name}))
        for option in (option for row in ROWS for option in row.options(offered) if option.gives_up):
            made = search.candidate((option,), situation.decided.training.rows_at_once)
            if isinstance(made, Candidate) and 0 < (least := search.bound_of(made.spec)) < capacity:
                found[name] = min(least, found.get(name, least))
    return tuple(sorted(found.items(), key=lambda item: item[1]))
