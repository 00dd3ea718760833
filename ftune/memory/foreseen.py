"""The plan of a run that is about to begin: of its own longest rows, on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ftune.errors import Problem
from ftune.machine import Machine
from ftune.memory.ask import config_of_model, plan_of
from ftune.memory.auto_rows import choose_rows
from ftune.memory.bounds import Bounds
from ftune.memory.candidates import room_of
from ftune.memory.fit import Fit, searched
from ftune.memory.gpus import of_this_machine
from ftune.memory.plan import MemoryPlan
from ftune.memory.source_text import recipe_of
from ftune.memory.tracer import kept_tracer
from ftune.recipe.edits import flow
from ftune.resolve import Decision, RunSpec
from ftune.training.foretold import BatchesOf, Forecast, LargestBatches, spoken
from ftune.units import format_bytes

_MOST_PLANS = 6
"""That a search for advice makes, the run's own among them: seconds each, and a refusal is to come soon."""


class Foresight:
    """Plans of one run on a machine; each recipe is planned once."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._gpu = of_this_machine(machine.gpus[0]) if machine.gpus else None
        self._plans: dict[str, MemoryPlan] = {}

    def foresee(self, spec: RunSpec, batches_of: BatchesOf) -> Forecast:
        """Return the plan of a decided run, and where it cannot fit the changes with which it does.

        Raises RecipeError and RunError for a model that cannot be traced.
        """
        with kept_tracer():
            plan = self._plan(spec, batches_of)
            lines = tuple(_lines(plan, on_gpu=bool(self._machine.gpus)))
            refusal = None
            if plan.fits is False:
                refusal = _refusal(plan, batches_of(spec), self._advice(spec, batches_of))
        return Forecast(plan.allocated_bytes, plan.parts, lines, refusal)

    def choose_rows(self, spec: RunSpec, batches_of: BatchesOf) -> tuple[Decision, ...]:
        """Return how many of the rows of a step fit at once, of those that are there, and in how many passes."""

        def plan(one: RunSpec) -> MemoryPlan:
            return self._plan(one, batches_of)

        with kept_tracer():
            return choose_rows(spec, plan, config_of_model(spec.recipe.model), self._gpu, self._machine)

    def _plan(self, spec: RunSpec, batches_of: BatchesOf) -> MemoryPlan:
        largest = batches_of(spec)
        key = repr((spec.recipe.as_dict(), largest))
        if key not in self._plans:
            self._plans[key] = plan_of(
                spec,
                config_of_model(spec.recipe.model),
                self._gpu,
                self._machine,
                ranks=int(os.environ.get("WORLD_SIZE", "1")),
                lengths=largest.train,
                evaluated=largest.evaluated,
                learned=largest.learned,
            )
        return self._plans[key]

    def _advice(self, spec: RunSpec, batches_of: BatchesOf) -> str:
        """Return the changes with which the run fits and learns the same, or what else there is."""

        def plan(one: RunSpec) -> MemoryPlan:
            return self._plan(spec if one.recipe == spec.recipe else one, batches_of)

        bounds, room = Bounds(config_of_model(spec.recipe.model)), room_of(self._gpu, self._machine)
        try:
            found = searched(recipe_of(spec), self._machine, frozenset(), plan, bounds, room, most_plans=_MOST_PLANS)
        except Exception:  # advice that cannot be had must not let a run begin that does not fit
            return "`ftune plan RECIPE --fit` looks for changes with which it does"
        return _said(found)


def _lines(plan: MemoryPlan, *, on_gpu: bool) -> Iterator[str]:
    needed, of = format_bytes(plan.peak_bytes), f"of {_capacity(plan)} that {plan.device} has"
    yield f"plan: {needed} needed {of}; most in {plan.peak_at}"
    yield f"plan: {spoken(plan.parts)}"
    if plan.is_tight:
        yield f"plan: tight; up to {format_bytes(plan.need.high_bytes)} may be taken"
    if not on_gpu:
        yield "plan: of tensors; peak_memory_bytes is the resident memory of the process, with libraries besides"


def _capacity(plan: MemoryPlan) -> str:
    return format_bytes(plan.capacity_bytes) if plan.capacity_bytes else "the memory"


def _refusal(plan: MemoryPlan, largest: LargestBatches, advice: str) -> Problem:
    longest = f"{len(largest.train)} x {max(largest.train):,} tokens"
    what = f"the largest batch, of {longest}, does not fit: {format_bytes(plan.peak_bytes)} are needed, "
    what += f"and {plan.device} has {_capacity(plan)}"
    why = f"at the peak, in {plan.peak_at}: {spoken(plan.parts)}"
    return Problem("plan-too-large", what, why=why, fix=f"{advice}; or try it all the same: --force")


def _said(found: Fit) -> str:
    changes = [change for change in found.changes if change.after is not None]
    if not found.fits or not changes:
        further = [name for name, _ in found.buys]
        allow = f" --allow {','.join(further[:3])}" if further else ""
        return f"nothing that learns the same was found to fit: `ftune plan RECIPE --fit{allow}` searches further"
    plan = found.after.plan
    settings = " with ".join(f"{change.key.removeprefix('training.')}: {flow(change.after)}" for change in changes)
    return f"set {settings}, which {'may fit, and ' if plan.is_tight else ''}needs {format_bytes(plan.peak_bytes)}"
