"""`per_device_train_batch_size: auto`: the largest micro-batch that fits, of a step whose rows stay what they are.

The rows of a step are the default micro-batch times `gradient_accumulation_steps`, as they are without `auto`. What is
decided is how many of them are computed at once, and in how many passes the others follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ftune.errors import Problem, RunError
from ftune.machine import Machine, free_bytes
from ftune.memory.bounds import Bounds
from ftune.memory.candidates import room_of, search_of
from ftune.memory.gpus import GpuFacts
from ftune.memory.plan import MemoryPlan
from ftune.memory.search import Candidate, Tried
from ftune.memory.source_text import recipe_of
from ftune.resolve import Decision, RunSpec
from ftune.units import format_bytes

ROWS, PASSES = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
_PART_OF_HOST = 0.9
"""Of what is free on a processor: libraries, and what its allocator cannot use, are in no plan. An assumption."""


def choose_rows(
    spec: RunSpec,
    plan_one: Callable[[RunSpec], MemoryPlan],
    config: Mapping[str, Any],
    gpu: GpuFacts | None,
    machine: Machine,
) -> tuple[Decision, Decision]:
    """Return how many rows are computed at once and in how many passes; the fewest rows where none fit.

    Raises RunError for a model that cannot be traced.
    """
    if gpu is None:
        free = min(free_bytes(), machine.memory_bytes)
        machine = dataclasses.replace(machine, memory_bytes=int(_PART_OF_HOST * free))

    def plan(one: RunSpec) -> MemoryPlan:
        found = plan_one(one)
        return found if gpu is not None else dataclasses.replace(found, capacity_bytes=machine.memory_bytes)

    search = search_of(recipe_of(spec), machine, frozenset(), plan, Bounds(config), room_of(gpu, machine))
    whole, fewest = search.rows[0], _fewest(search.rows, search.candidate)
    found = search.unchanged()
    if found is None:
        search.plan(fewest.spec)  # raises where nothing fits because nothing can be traced
    training = (found.candidate if found is not None else fewest).spec.recipe.training
    rows, passes = training.rows_at_once, training.gradient_accumulation_steps
    why = f"not even so few of the {whole} rows of a step fit"
    if found is not None:
        why = _why(found, whole, on_gpu=gpu is not None)
    return Decision(ROWS, rows, why), Decision(PASSES, passes, f"{passes} x {rows} are the {whole} rows of a step")


def _fewest(rows: tuple[int, ...], candidate_of: Callable[..., Any]) -> Candidate:
    """Return the recipe with the smallest micro-batch that the rules accept: some optimizers take one pass only."""
    candidates = (candidate_of((), count) for count in reversed(rows))
    found = next((one for one in candidates if isinstance(one, Candidate)), None)
    if found is None:
        what = f"no number of rows stands for {ROWS}: auto"
        raise RunError(Problem("rows-auto", what, why=candidate_of((), rows[0]).reason, fix="set a number of rows"))
    return found


def _why(found: Tried, whole: int, *, on_gpu: bool) -> str:
    plan = found.plan
    assert plan.capacity_bytes is not None
    owner = f"that {plan.device} has" if on_gpu else "that may be taken here"
    of = f"{format_bytes(plan.need.high_bytes)} of {format_bytes(plan.capacity_bytes)} {owner}"
    if found.rows == whole:
        return f"all {whole} rows of a step fit at once: {of}"
    return f"of the {whole} rows of a step the most that fit{', tightly' if plan.is_tight else ''}: {of}"
