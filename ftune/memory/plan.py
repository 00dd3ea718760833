"""What a run needs of a GPU, before it begins: bytes by what they are for, and the time of a step.

Live bytes are counted from the run's own step (`traced`). What a GPU needs beyond them is a model: the caching
allocator replayed over the same step (`replay`), where nothing stops it and in the least that it passes with, and the
context of the process (`overhead`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from ftune.memory.events import Owner, Trace
from ftune.memory.gpus import GpuFacts
from ftune.memory.layers import depth, most, peaks_of, peaks_of_depth, period
from ftune.memory.overhead import Need, need, with_workspaces
from ftune.memory.peak import Peak, peak
from ftune.memory.replay import least_capacity, replay
from ftune.memory.step_time import step_time
from ftune.recipe.schema import Training
from ftune.resolve import RunSpec
from ftune.training.checkpoint import planned_saves, room_needed

PARTS: Mapping[Owner, str] = {
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
    """What is alive at the instant of the peak, and `overhead`: the least that the device needs beyond it."""
    phases: Mapping[str, int]
    """Most bytes alive in each phase of a step."""
    peak_at: str
    """Phase, module and operator."""
    allocated_bytes: int
    """What `torch.cuda.max_memory_allocated` is going to say; live bytes on a processor."""
    need: Need
    """Of the whole device. On a processor both ends are the live bytes."""
    device: str
    capacity_bytes: int | None
    host_bytes: int
    """Kept in the host's memory beside the process: optimizer state, groups whose turn it is not."""
    disk_bytes: int
    """Most that a run leaves in its directory: the checkpoints that are kept, the one being written, the result."""
    tokens_per_step: int
    """Of the largest batch that the recipe allows, all its micro-batches together."""
    seconds_per_step: float | None
    """None where the device's speed is not known."""
    steps: int | None = None
    """Of the whole run; None where their number depends on how many rows there are."""
    assumed: str = ""
    """What a name that fits several GPUs was taken for."""
    devices: int = 1
    """How many share the run; bytes are those of each."""

    @property
    def live_bytes(self) -> int:
        """Return what all tensors take at the peak."""
        return sum(self.parts.values()) - self.parts["overhead"]

    @property
    def peak_bytes(self) -> int:
        """Return the least memory with which the step can pass: the sum of the parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """Return whether the step can pass; None where there is no capacity to compare with."""
        return None if self.capacity_bytes is None else self.peak_bytes <= self.capacity_bytes

    @property
    def is_tight(self) -> bool:
        """Return whether it may not pass after all: the high end of what is needed is beyond the capacity."""
        return bool(self.fits) and self.need.high_bytes > (self.capacity_bytes or 0)

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens_per_step / self.seconds_per_step if self.seconds_per_step else None

    @property
    def run_seconds(self) -> float | None:
        """Return how long all steps take, if every row is as long as planned; evaluating and saving come on top."""
        return self.steps * self.seconds_per_step if self.steps and self.seconds_per_step else None

    @property
    def gpu_hours(self) -> float | None:
        """Return for how many hours the run has its GPU to itself."""
        return None if self.run_seconds is None else self.run_seconds / 3600

    def as_json(self) -> dict[str, Any]:
        """Return the answer of `plan --json`."""
        return {
            "parts": dict(self.parts),
            "peak_bytes": self.peak_bytes,
            "live_bytes": self.live_bytes,
            "allocated_bytes": self.allocated_bytes,
            "high_bytes": self.need.high_bytes,
            "peak_at": self.peak_at,
            "phases": dict(self.phases),
            "device": self.device,
            "assumed": self.assumed,
            "capacity_bytes": self.capacity_bytes,
            "fits": self.fits,
            "tight": self.is_tight,
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "devices": self.devices,
            "tokens_per_step": self.tokens_per_step,
            "seconds_per_step": self.seconds_per_step,
            "tokens_per_second": self.tokens_per_second,
            "steps": self.steps,
            "run_seconds": self.run_seconds,
            "gpu_hours": self.gpu_hours,
            "changes": [],
        }


@dataclass(frozen=True)
class _Beyond:
    """What a trace comes to beyond its live bytes; of a deep model by what two shallow ones differ in."""

    rounding: float
    """Bytes by which the allocator rounds requests up."""
    kept: float
    """Bytes that it cannot use even where it gives back all that it can: fragments between what is alive."""
    unused: float
    """Bytes that it reserves and cannot use where nothing stops it."""
    host: float
    checkpoint: float
    result: float
    """Bytes of a checkpoint and of the final model on the disk."""
    seconds: float

    @staticmethod
    def of(trace: Trace, gpu: GpuFacts | None, *, tf32: bool) -> _Beyond:
        """Without a GPU there is no caching allocator: what a process needs beside its tensors is not planned."""
        on_disk = trace.checkpoint_bytes, trace.model_bytes
        if gpu is None:
            return _Beyond(0, 0, 0, 0, *on_disk, 0)
        events = with_workspaces(trace.events, gpu.capability)
        replayed = replay(events)
        seconds = step_time(trace.work, gpu, tf32=tf32).seconds if gpu.has_speed else 0.0
        allocated, reserved = replayed.peak_allocated_bytes, replayed.peak_reserved_bytes
        least = min(least_capacity(events), reserved)
        rounding = allocated - peak(trace).size_bytes
        return _Beyond(rounding, least - allocated, reserved - allocated, trace.host_bytes, *on_disk, seconds)

    def at(self, share: float, other: _Beyond) -> _Beyond:
        """Return the figures on the line through these (share 0) and others (share 1)."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return _Beyond(*(max(0.0, mine + (theirs - mine) * share) for mine, theirs in pairs))


def planned(
    spec: RunSpec,
    config: Mapping[str, Any],
    gpu: GpuFacts | None,
    trace_of: Callable[[int | None], Trace],
    *,
    host_memory_bytes: int = 0,
    whole: Trace | None = None,
    devices: int = 1,
) -> MemoryPlan:
    """Return the plan of a run on a GPU; without one, on a processor with so much memory.

    `trace_of` traces the step of the model with a number of layers, or with all that it has (None); `whole` is a trace
    of all, where there is one. Several devices share the run, and each has one trace.
    """
    traces: dict[int | None, Trace] = {} if whole is None else {None: whole}

    def traced(layers: int | None) -> Trace:
        if layers not in traces:
            traces[layers] = trace_of(layers)
        return traces[layers]

    layers, every = depth(config), period(config)
    few = bool(every and layers) and whole is None
    phases = peaks_of_depth(traced, layers, every=every or 1) if few else peaks_of(traced(None))
    highest = most(phases)
    recipe = spec.recipe
    rows = recipe.training.rows_at_once * recipe.training.gradient_accumulation_steps
    parts = {said: highest.by_owner.get(owner, 0) for owner, said in PARTS.items()}
    beyond = _beyond(traces, layers, lambda trace: _Beyond.of(trace, gpu, tf32=bool(recipe.training.tf32)))
    allocated = round(highest.size_bytes + beyond.rounding)
    needs = Need(allocated, allocated)
    if gpu is not None:
        needs = need(round(allocated + beyond.kept), round(allocated + beyond.unused), gpu.capability, devices)
    return MemoryPlan(
        parts={**parts, "overhead": needs.low_bytes - highest.size_bytes},
        phases={phase: found.size_bytes for phase, found in phases.items()},
        peak_at=_place(highest),
        allocated_bytes=allocated,
        need=needs,
        device=gpu.name if gpu is not None else "the processor",
        capacity_bytes=gpu.memory_bytes if gpu is not None else host_memory_bytes or None,
        host_bytes=round(beyond.host),
        disk_bytes=_on_disk(recipe.training, round(beyond.checkpoint), round(beyond.result)),
        tokens_per_step=rows * recipe.data.max_length * devices,
        devices=devices,
        seconds_per_step=beyond.seconds or None,
        steps=recipe.training.max_steps if recipe.training.max_steps > 0 else None,
        assumed=gpu.assumed if gpu is not None else "",
    )


def _beyond(traces: Mapping[int | None, Trace], layers: int, of: Callable[[Trace], _Beyond]) -> _Beyond:
    whole = traces.get(layers, traces.get(None))
    if whole is not None:
        return of(whole)
    few, more = sorted(number for number in traces if number is not None)[-2:]
    return of(traces[few]).at((layers - few) / (more - few), of(traces[more]))


def _on_disk(training: Training, checkpoint_bytes: int, model_bytes: int) -> int:
    """Return what a run leaves; where its length depends on the rows, one that is long enough for every checkpoint."""
    keep = training.save_total_limit
    saves = 1 if keep is None else keep + 2
    if training.max_steps > 0 or training.save_strategy != "steps":
        saves = planned_saves(training, training.max_steps)
    return room_needed(checkpoint_bytes=checkpoint_bytes, model_bytes=model_bytes, keep=keep, saves=saves)


def _place(highest: Peak) -> str:
    where = highest.module or "outside of every module"
    return ", ".join(part for part in (highest.phase, where, highest.operation) if part)
