"""Bytes of the GPU's memory that are no tensor's: the context with its kernels, the libraries' workspaces.

What a process holds beside PyTorch was measured on one H100; for other generations it is what PyTorch's own messages
said of processes that ran out of memory ("Including non-PyTorch memory, this process has ..."): a range and no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ftune.memory.events import Event, Owner

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Context:
    """What a process holds beside what PyTorch reserves."""

    low_mib: int
    high_mib: int
    source: str


CONTEXTS: dict[tuple[int, int], Context] = {
    (6, 0): Context(300, 820, "0.80 GiB in one message from a P100 of 2023, before kernels were loaded as needed"),
    (7, 0): Context(190, 450, "none for a V100; as for Turing"),
    (7, 5): Context(190, 450, "0.19 GiB in one message from an RTX 2080 Ti"),
    (8, 0): Context(480, 650, "0.49 and 0.50 GiB in messages from A100s"),
    (8, 6): Context(220, 400, "0.22 GiB in a message from an RTX 3090, 0.25 GiB from an RTX 3080"),
    (8, 9): Context(250, 640, "0.34 to 0.49 GiB in messages from an RTX 4080, RTX 4090 and RTX 6000 Ada"),
    (9, 0): Context(527, 800, "measured: 552,403,024 bytes on an H100 (driver 580, CUDA 13.0) once there is a context"),
    (10, 0): Context(527, 1000, "none for a B200; not less than an H100"),
    (12, 0): Context(580, 780, "0.58 and 0.60 GiB in messages from RTX 5090s"),
}
_ANY = Context(190, 1000, "none for this GPU; the range of all")

_NCCL_MIB = (150, 1024)
"""NCCL's buffers with several GPUs; not measured."""

MARGIN = 0.02
"""Part of what is reserved that is added above: scratch that kernels take inside is not in a trace. Not measured."""


def context_of(capability: tuple[int, int]) -> Context:
    """Return the range for a compute capability."""
    return CONTEXTS.get(capability, _ANY)


def workspace_bytes(capability: tuple[int, int]) -> int:
    """Return cuBLAS's workspace for one thread, which PyTorch takes from its allocator.

    `parseChosenWorkspaceSize` of aten/src/ATen/cuda/CublasHandlePool.cpp, PyTorch 2.13: 32 MiB on Hopper and Blackwell
    (Hopper alone in older versions), `:4096:2:16:8` elsewhere; 128 MiB on MI300. CUBLAS_WORKSPACE_CONFIG changes it.
    """
    if capability == (9, 4):  # what ROCm calls gfx942
        return 128 * _MIB
    return 32 * _MIB if capability[0] in (9, 10, 12) else 2 * 4096 * 1024 + 8 * 16 * 1024


def with_workspaces(events: Iterable[Event], capability: tuple[int, int]) -> tuple[Event, ...]:
    """Return a trace's events with the workspaces of forward and of backward, which runs in a thread of its own.

    They are made in the first step and stay, so that they lie behind what was there at the start.
    """
    events = tuple(events)
    first = next((place for place, event in enumerate(events) if event.phase != "start"), len(events))
    size = workspace_bytes(capability)
    made = (Event(-1 - number, size, Owner.BUFFER, "start", "", "cublas workspace") for number in range(2))
    return (*events[:first], *made, *events[first:])


@dataclass(frozen=True)
class Need:
    """Bytes of the GPU's memory that a run takes, from the least to the most that is expected."""

    low_bytes: int
    """The least that the allocator passes with, and the least context."""
    high_bytes: int
    """What the allocator reserves if nothing stops it, the most context, and a margin."""

    def fits(self, memory_bytes: int) -> bool | None:
        """Return whether it fits into what torch reports as total; None where it may or may not."""
        return True if memory_bytes >= self.high_bytes else False if memory_bytes < self.low_bytes else None


def need(least_bytes: int, reserved_bytes: int, capability: tuple[int, int], gpus: int = 1) -> Need:
    """Return what a replayed trace takes of a GPU, one of several that are connected by NCCL.

    `least_bytes` is what the allocator passes with, `reserved_bytes` what it takes where nothing stops it.
    """
    context = context_of(capability)
    nccl = _NCCL_MIB if gpus > 1 else (0, 0)
    low = least_bytes + (context.low_mib + nccl[0]) * _MIB
    high = reserved_bytes * (1 + MARGIN) + (context.high_mib + nccl[1]) * _MIB
    return Need(low, int(high))
