"""How long a traced step takes on a GPU: a roofline over what it computes and moves, and what starting operators costs.

Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009: an operator takes the longer of its multiplications at the
rate that the GPU reaches, and of its bytes at the bandwidth that it reaches. The processor starts operators one after
another and runs ahead of the GPU, so that a phase takes the longer of what the GPU does and what starting it costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ftune.memory.events import Work
from ftune.memory.gpus import GpuFacts


@dataclass(frozen=True)
class Efficiency:
    """What part of a datasheet's rates a kind of operator reaches."""

    flops: float
    bandwidth: float
    reason: str


EFFICIENCIES: dict[str, Efficiency] = {
    "product": Efficiency(0.7, 0.8, ""),
    "attention": Efficiency(0.5, 0.8, ""),
    "other": Efficiency(0.5, 0.75, ""),
}

_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "addbmm",
    "_grouped_mm",
    "_scaled_mm",
    "linear",
    "convolution",
    "gemm_4bit",
)
_ATTENTION = ("attention",)

LAUNCH_SECONDS = 8e-6
RAMP_SECONDS = 3e-6


@dataclass(frozen=True)
class StepTime:
    """How long a step takes, by phase."""

    seconds: float
    by_phase: dict[str, float]
    launching: float
    """Seconds of it in which the GPU waits for the processor."""


def kind_of(operation: str) -> str:
    """Return the row of EFFICIENCIES of an operator: `aten::mm` is a product."""
    name = operation.rpartition("::")[2].partition(".")[0]
    if any(word in name for word in _ATTENTION):
        return "attention"
    return "product" if name.removesuffix("_backward").removesuffix("_out") in _PRODUCTS else "other"


def gpu_seconds(work: Work, gpu: GpuFacts, *, tf32: bool = False) -> float:
    """Return how long the GPU is busy with operators of one kind."""
    efficiency = EFFICIENCIES[kind_of(work.operation)]
    dtype = "tf32" if tf32 and work.dtype == "float32" and "tf32" in (gpu.flops_per_second or {}) else work.dtype
    computing = work.flops / (gpu.peak_flops(dtype) * efficiency.flops)
    moving = work.moved_bytes / (gpu.memory_bytes_per_second * efficiency.bandwidth)
    return max(computing, moving) + work.count * RAMP_SECONDS


def step_time(works: Iterable[Work], gpu: GpuFacts, *, tf32: bool = False) -> StepTime:
    """Return how long an optimizer step takes. Needs a GPU of the table: `gpu.has_speed`."""
    busy: dict[str, float] = {}
    started: dict[str, float] = {}
    for work in works:
        busy[work.phase] = busy.get(work.phase, 0.0) + gpu_seconds(work, gpu, tf32=tf32)
        started[work.phase] = started.get(work.phase, 0.0) + work.count * LAUNCH_SECONDS
    by_phase = {phase: max(busy[phase], started[phase]) for phase in busy}
    seconds = sum(by_phase.values())
    return StepTime(seconds, by_phase, seconds - sum(busy.values()))


@dataclass(frozen=True)
class RunTime:
    """What a whole run takes."""

    seconds_per_step: float
    tokens_per_second: float
    """Of all GPUs together, padding included."""
    seconds: float
    gpu_hours: float


def run_time(step: StepTime, *, tokens_per_step: int, steps: int, gpus: int = 1) -> RunTime:
    """Return what a run of `steps` takes; `tokens_per_step` are those of all GPUs together."""
    return RunTime(
        seconds_per_step=step.seconds,
        tokens_per_second=tokens_per_step / step.seconds if step.seconds else 0.0,
        seconds=step.seconds * steps,
        gpu_hours=step.seconds * steps * gpus / 3600,
    )
