"""Steps of many micro-batches from those of few.

Where gradients are added up, the third micro-batch finds memory as the second did, and computes the same: what a step
holds is that of three and the rows of the others, and each further one computes what the third did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ftune import plugin
from ftune.memory.events import Event, Owner, Trace, Work
from ftune.memory.peak import Peak, peak
from ftune.resolve import RunSpec, with_training

_FEW, _MORE = 2, 3


def followed(spec: RunSpec) -> int:
    """Return how many micro-batches of a step are followed: all, or as many as show what the others do."""
    passes, chosen = spec.recipe.training.gradient_accumulation_steps, spec.recipe.optimizer
    if passes <= _FEW + _MORE or not plugin.optimizer(chosen.method).adds_up(chosen.options):
        return passes
    return _MORE


def of_many_passes(spec: RunSpec, trace_of: Callable[[RunSpec], Trace]) -> Trace:
    """Return the trace of a run's step; what it computes is told of all micro-batches, what it holds of three."""
    passes = spec.recipe.training.gradient_accumulation_steps
    if followed(spec) == passes:
        return trace_of(spec)
    few, more = (trace_of(with_training(spec, gradient_accumulation_steps=count)) for count in (_FEW, _MORE))
    events = (*_rows_of(peak(few), peak(more), passes, more.events), *more.events)
    return dataclasses.replace(more, events=events, work=_extended(few.work, more.work, passes))


def _rows_of(few: Peak, more: Peak, passes: int, events: tuple[Event, ...]) -> list[Event]:
    """Return the rows of further micro-batches: those of a step are all on the device from its start."""
    free = 1 + max(event.storage for event in events)
    sizes = ((owner, (passes - _MORE) * (more.by_owner[owner] - few.by_owner[owner])) for owner in Owner)
    return [
        Event(free + number, size, owner, events[0].phase, "", "")
        for number, (owner, size) in enumerate(sizes)
        if size > 0
    ]


def _extended(few: tuple[Work, ...], more: tuple[Work, ...], passes: int) -> tuple[Work, ...]:
    before = {(work.phase, work.operation, work.dtype): work for work in few}
    found = []
    for work in more:
        old = before.get((work.phase, work.operation, work.dtype))
        times = (passes - _MORE) / (_MORE - _FEW)

        def at(now: int, then: int, times: float = times) -> int:
            return round(now + (now - then) * times)

        count, flops, moved = (old.count, old.flops, old.moved_bytes) if old else (0, 0, 0)
        found.append(
            dataclasses.replace(
                work,
                count=at(work.count, count),
                flops=at(work.flops, flops),
                moved_bytes=at(work.moved_bytes, moved),
            )
        )
    return tuple(found)
