"""What a run needs of a GPU, before it begins: bytes by what they are for, and the time of a step.

Live bytes are counted from the run's own step (`traced`). What a GPU needs beyond them is a model: the caching
allocator replayed over the same step (`replay`), and the context of the process (`constants`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftune.memory.constants import context_bytes
from ftune.memory.events import Owner, Trace
from ftune.memory.gpus import GpuFacts
from ftune.memory.peak import Peak, peak
from ftune.memory.replay import least_capacity, replay
from ftune.memory.step_time import step_time
from ftune.resolve import RunSpec

_PARTS: Mapping[Owner, str] = {
    Owner.WEIGHT: "weights",
    Owner.GRADIENT: "gradients",
    Owner.OPTIMIZER: "optimizer",
    Owner.ACTIVATION: "activations",
    Owner.LOGITS: "logits",
    Owner.BUFFER: "buffers",
    Owner.TEMPORARY: "temporaries",
}


@dataclass(frozen=True)
class MemoryPlan:
    """What one GPU, or without one the processor, holds at the most: bytes throughout."""

    parts: Mapping[str, int]
    """What is alive at the instant of the peak, and `overhead`: what the device needs beyond; their sum is the peak."""
    live_bytes: int
    """Of all tensors at the peak, counted from the run's own step."""
    peak_bytes: int
    """The least memory in which the step passes: live bytes, what the allocator cannot use, and the context."""
    comfortable_bytes: int
    """The memory with which the allocator never has to give anything back."""
    peak_at: str
    """Phase, module and operator."""
    capacity_bytes: int | None
    device: str
    tokens_per_step: int
    """Of the largest batch that the recipe allows, all micro-batches and all GPUs together."""
    host_bytes: int
    """Beyond the process's own: optimizer state and groups kept in the host's memory."""
    seconds_per_step: float | None
    """None where the device's speed is not known."""
    events: Trace

    @property
    def fits(self) -> bool | None:
        """Return whether the step passes; None where there is no capacity to compare with."""
        return None if self.capacity_bytes is None else self.peak_bytes <= self.capacity_bytes

    @property
    def tight(self) -> bool:
        """Return whether it passes only as long as the allocator gives memory back, or on a lucky day."""
        return bool(self.fits) and self.comfortable_bytes > (self.capacity_bytes or 0)

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens_per_step / self.seconds_per_step if self.seconds_per_step else None

    def as_json(self) -> dict[str, Any]:
        """Return the answer of `plan --json`."""
        return {
            "parts": dict(self.parts),
            "peak_bytes": self.peak_bytes,
            "live_bytes": self.live_bytes,
            "comfortable_bytes": self.comfortable_bytes,
            "peak_at": self.peak_at,
            "device": self.device,
            "capacity_bytes": self.capacity_bytes,
            "fits": self.fits,
            "host_bytes": self.host_bytes,
            "tokens_per_step": self.tokens_per_step,
            "seconds_per_step": self.seconds_per_step,
            "tokens_per_second": self.tokens_per_second,
        }


def planned(spec: RunSpec, trace: Trace, gpu: GpuFacts | None, *, host_capacity_bytes: int = 0) -> MemoryPlan:
    """Return the plan of a traced step on a GPU; without one, on a processor with so much memory.

    Processors have no caching allocator: what they need beyond live bytes is the process itself, which is not planned.
    """
    highest = peak(trace)
    least = comfortable = highest.size_bytes
    if gpu is not None:
        context = context_bytes(gpu)
        least = least_capacity(trace.events) + context.least
        comfortable = replay(trace.events).peak_reserved_bytes + context.most
    parts = {said: highest.by_owner.get(owner, 0) for owner, said in _PARTS.items()}
    recipe = spec.recipe
    batches = recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps
    timed = gpu is not None and gpu.has_speed
    return MemoryPlan(
        parts={**parts, "overhead": least - highest.size_bytes},
        live_bytes=highest.size_bytes,
        peak_bytes=least,
        comfortable_bytes=comfortable,
        peak_at=_place(highest),
        capacity_bytes=gpu.memory_bytes if gpu is not None else host_capacity_bytes or None,
        device=gpu.name if gpu is not None else "the processor",
        tokens_per_step=batches * recipe.data.max_length,
        host_bytes=trace.host_bytes,
        seconds_per_step=step_time(trace.work, gpu, tf32=bool(recipe.training.tf32)).seconds
        if gpu is not None and timed
        else None,
        events=trace,
    )


def _place(highest: Peak) -> str:
    where = highest.module or "outside of every module"
    return ", ".join(part for part in (highest.phase, where, highest.operation) if part)
