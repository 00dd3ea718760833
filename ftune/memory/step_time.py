"""How long a traced step takes on a GPU: a roofline over what it computes and moves, and what starting operators costs.

Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009: an operator takes the longer of its multiplications at
the rate that the GPU reaches, and of its bytes at the bandwidth that it reaches. The processor starts operators one
after another and runs ahead of the GPU, so that a phase takes the longer of what the GPU does and what starting costs.

None of the constants was fitted to a training step: the time tells minutes from hours, and one setting from another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ftune.memory.events import Work
from ftune.memory.gpus import GpuFacts


@dataclass(frozen=True)
class Efficiency:
    """What part of a datasheet's rates a kind of operator reaches."""

    flops: float
    bandwidth: float
    reason: str


EFFICIENCIES: Mapping[str, Efficiency] = {
    "product": Efficiency(
        0.7,
        0.75,
        "8192 x 8192 x 8192 in bfloat16 was seen to reach 0.81 on an H100, 0.80 on an H200 and 0.83 on an "
        "RTX PRO 6000; the products of a layer are smaller",
    ),
    "attention": Efficiency(
        0.45,
        0.75,
        "FlashAttention-2 reaches up to 0.72 on an A100 (arXiv 2307.08691) and 0.35 on an H100 (arXiv 2407.08608); "
        "causal attention skips half of what is counted",
    ),
    "other": Efficiency(
        0.5,
        0.75,
        "a copy was seen to reach 0.90 on an H100 and on an H200; reductions and narrow tensors reach less",
    ),
}

_PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "_grouped_mm", "_scaled_mm", "linear", "convolution", "gemm_4bit"),
    *("linear_backward", "convolution_backward"),
}

_BESIDE = ("start", "evaluation")
"""Phases of a trace that are no part of a step."""

START_SECONDS = 6e-6
"""What the processor needs to start one operator from Python: 4 to 10 microseconds are usual."""
LEAST_SECONDS = 2e-6
"""What the GPU needs for an operator however small."""


@dataclass(frozen=True)
class StepTime:
    """How long an optimizer step takes."""

    by_phase: Mapping[str, float]
    """Seconds."""
    waiting: float
    """Seconds of them in which the GPU waits for the processor."""

    @property
    def seconds(self) -> float:
        return sum(self.by_phase.values())


def kind_of(operation: str) -> str:
    """Return the row of EFFICIENCIES of an operator: `aten::mm` is a product."""
    name = operation.rpartition("::")[2].partition(".")[0]
    if "attention" in name:
        return "attention"
    return "product" if name in _PRODUCTS else "other"


def gpu_seconds(work: Work, gpu: GpuFacts, *, tf32: bool = False) -> float:
    """Return how long the GPU is busy with operators of one kind; `tf32` as in `training.tf32`."""
    efficiency = EFFICIENCIES[kind_of(work.operation)]
    dtype = "tf32" if tf32 and work.dtype == "float32" else work.dtype
    computing = work.flops / (gpu.peak_flops(dtype) * efficiency.flops)
    moving = work.moved_bytes / (gpu.memory_bytes_per_second * efficiency.bandwidth)
    return max(computing, moving, work.count * LEAST_SECONDS)


def step_time(works: Iterable[Work], gpu: GpuFacts, *, tf32: bool = False) -> StepTime:
    """Return how long an optimizer step takes on a GPU of the table (`gpu.has_speed`)."""
    busy: dict[str, float] = {}
    starting: dict[str, float] = {}
    for work in works:
        if work.phase in _BESIDE:
            continue
        busy[work.phase] = busy.get(work.phase, 0.0) + gpu_seconds(work, gpu, tf32=tf32)
        starting[work.phase] = starting.get(work.phase, 0.0) + work.count * START_SECONDS
    by_phase = {phase: max(busy[phase], starting[phase]) for phase in busy}
    return StepTime(by_phase, sum(by_phase.values()) - sum(busy.values()))
