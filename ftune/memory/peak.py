"""The instant at which a traced step holds most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ftune.memory.events import Owner, Trace


@dataclass(frozen=True)
class Peak:
    """What is held at one instant; the largest of each owner over the step add up to more."""

    size_bytes: int
    by_owner: Mapping[Owner, int]
    phase: str
    module: str
    operation: str
    """The operator whose result made it the peak."""


def peak(trace: Trace, phase: str | None = None) -> Peak:
    """Return the peak of a trace, or of one phase of it."""
    live = most = 0
    at = -1
    for number, event in enumerate(trace.events):
        live += event.size_bytes
        if live > most and phase in (None, event.phase):
            most, at = live, number
    held = dict.fromkeys(Owner, 0)
    for event in trace.events[: at + 1]:
        held[event.owner] += event.size_bytes
    if at < 0:
        return Peak(0, held, phase or "", "", "")
    last = trace.events[at]
    return Peak(most, held, last.phase, last.module, last.operation)


def phases(trace: Trace) -> dict[str, int]:
    """Return the most bytes held in each phase of a trace, in the order in which they first occur."""
    live, found = 0, {}
    for event in trace.events:
        live += event.size_bytes
        found[event.phase] = max(found.get(event.phase, 0), live)
    return found
