"""Allocations of a trace, done over with PyTorch's allocator: what they reserve, and in how much they pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ftune.memory.allocator import Block, CachingAllocator, OutOfMemory
from ftune.memory.allocator_settings import Settings

_MIB = 1024 * 1024


class Change(Protocol):
    """What is read of an event of a trace: a storage made (`size_bytes` > 0) or freed (< 0)."""

    @property
    def storage(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...


@dataclass(frozen=True)
class Replay:
    """What a sequence of events came to."""

    peak_allocated_bytes: int
    """Most bytes in use, with every request rounded up: `torch.cuda.max_memory_allocated`."""
    peak_reserved_bytes: int
    """Most bytes taken from CUDA: `torch.cuda.max_memory_reserved`."""
    peak_at: int
    """Position of the event with which the most bytes were in use."""
    retries: int
    """How often all cached memory was given back to make room, which costs a wait for the GPU each time."""
    full_at: int | None
    """Position of the event for which there was no room, and at which the replay ended."""


def replay(events: Iterable[Change], settings: Settings | None = None, capacity_bytes: int | None = None) -> Replay:
    """Do the events in order, up to the first for which there is no room."""
    allocator = CachingAllocator(settings, capacity_bytes)
    live: dict[int, Block] = {}
    peak = peak_at = 0
    full_at = None
    for position, event in enumerate(events):
        if event.size_bytes > 0:
            try:
                live[event.storage] = allocator.allocate(event.size_bytes)
            except OutOfMemory:
                full_at = position
                break
            if allocator.allocated > peak:
                peak, peak_at = allocator.allocated, position
        elif event.size_bytes < 0:
            allocator.free(live.pop(event.storage))
    return Replay(peak, allocator.peak_reserved, peak_at, allocator.retries, full_at)


def least_capacity(events: Sequence[Change], settings: Settings | None = None, step_bytes: int = 2 * _MIB) -> int:
    """Return the least bytes for the allocator with which the events pass, found by halving, to `step_bytes`.

    More room does not always suffice where less did, since what was cached decides what is split; so a capacity above
    the returned one is not proven to be enough, only likely.
    """
    unlimited = replay(events, settings)
    low = unlimited.peak_allocated_bytes // step_bytes
    high = -(-unlimited.peak_reserved_bytes // step_bytes)
    while low < high:
        middle = (low + high) // 2
        if replay(events, settings, middle * step_bytes).full_at is None:
            high = middle
        else:
            low = middle + 1
    return high * step_bytes
