"""A recipe with other settings, examined by the rules, and the search over such recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ftune.errors import FtuneError
from ftune.machine import Machine
from ftune.memory.bounds import Bounds
from ftune.memory.changes import Situation
from ftune.memory.gpus import GpuFacts
from ftune.memory.overhead import need
from ftune.memory.plan import MemoryPlan
from ftune.memory.search import Candidate, Refused, Room, Search
from ftune.recipe import Loaded, source, validate
from ftune.recipe.edits import edited
from ftune.resolve import RunSpec, findings, resolve


def search_of(
    loaded: Loaded,
    machine: Machine,
    allowed: frozenset[str],
    plan: Callable[[RunSpec], MemoryPlan],
    bounds: Bounds,
    room: Room,
    most_plans: int | None = None,
) -> Search:
    """Return the search over changes of a recipe, with a function that plans one."""

    def build(settings: Mapping[str, Any]) -> Candidate | Refused:
        return built(loaded, machine, settings)

    def bound(spec: RunSpec) -> int:
        try:
            return bounds.of(spec.recipe)
        except Exception:  # what a model cannot be tuned so for, its trace says, whatever library refused it
            return 0

    situation = Situation(loaded, resolve(loaded, machine, fingerprints=False).recipe, allowed)
    return Search(situation, build, plan, bound, room, most_plans)


def room_of(facts: GpuFacts | None, machine: Machine) -> Room:
    """Return what is left for tensors beside the context and a margin."""
    if facts is None:
        return Room(machine.memory_bytes, machine.memory_bytes)
    beside = need(0, 0, facts.capability)
    return Room(facts.memory_bytes - beside.low_bytes, facts.memory_bytes - beside.high_bytes)


def built(loaded: Loaded, machine: Machine, settings: Mapping[str, Any]) -> Candidate | Refused:
    """Return a recipe with settings in its text, examined by the rules."""
    file = loaded.source.file
    try:
        text = edited(file, loaded.source.text, settings)
        made = validate(source.parse(file, text))
        found = findings(made, machine, trains=False)
        errors = [one.rule for one in found if one.severity == "error" and not one.rule.startswith("data-")]
        if errors:
            return Refused(", ".join(dict.fromkeys(errors)))
        return Candidate(settings, text, resolve(made, machine, fingerprints=False))
    except FtuneError as error:
        return Refused(", ".join(dict.fromkeys(problem.rule for problem in error.problems)))
