"""A plan on a terminal."""

from __future__ import annotations

from typing import TextIO

from ftune.memory.plan import MemoryPlan
from ftune.resolve import RunSpec
from ftune.units import format_bytes, format_duration

SAID = {
    "logits": "logits and loss",
    "buffers": "buffers and inputs",
    "overhead": "context and allocator",
}


def show(spec: RunSpec, plan: MemoryPlan, stream: TextIO) -> None:
    """Print what is held at the peak, and whether it fits."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False, soft_wrap=True)
    console.print(heading(spec, plan))
    table = Table(box=box.ASCII2 if not console.is_terminal else box.SIMPLE_HEAD)
    for name, side in (("at the peak", "left"), ("bytes", "right"), ("", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for part, size in plan.parts.items():
        if size:
            table.add_row(SAID.get(part, part), f"{size:,}", format_bytes(size))
    table.add_section()
    table.add_row("needed", f"{plan.peak_bytes:,}", format_bytes(plan.peak_bytes))
    console.print(table)
    for line in (*lines_of(plan), verdict(plan)):
        console.print(line)


def heading(spec: RunSpec, plan: MemoryPlan) -> str:
    """Return what is planned, in a line."""
    recipe = spec.recipe
    rows = recipe.training.rows_at_once
    times = recipe.training.gradient_accumulation_steps
    batch = f"{rows} x {recipe.data.max_length:,} tokens" + (f", {times} times a step" if times > 1 else "")
    method = f"{recipe.tuning.method}, {recipe.training.optim}, {recipe.model.dtype} weights"
    where = f"each of {plan.devices} x {plan.device}" if plan.devices > 1 else plan.device
    return f"{recipe.model.model_name_or_path}: {method}, {batch}; on {where}"


def lines_of(plan: MemoryPlan) -> list[str]:
    """Return what there is to say beside the table."""
    lines = [plan.assumed] if plan.assumed else []
    lines.append(f"the peak is in {plan.peak_at}")
    if plan.host_bytes:
        lines.append(f"the host keeps {format_bytes(plan.host_bytes)} beside the process")
    if plan.need.high_bytes > plan.peak_bytes:
        lines.append(
            f"up to {format_bytes(plan.need.high_bytes)} may be taken: what the allocator cannot use, a margin"
        )
    lines.append(f"the run directory takes up to {format_bytes(plan.disk_bytes)} of disk")
    if plan.seconds_per_step is not None:
        speed = plan.tokens_per_second or 0.0
        lines.append(f"about {plan.seconds_per_step:.2g} s a step, {speed:,.0f} tokens/s (a model, not measured)")
        lines.append(_course(plan.seconds_per_step, plan.steps, plan.devices))
        if plan.devices > 1:
            lines.append("what the devices send each other takes time besides, which is not in it")
    return lines


def _course(seconds_per_step: float, steps: int | None, devices: int) -> str:
    """Return how long a run takes; of one whose steps depend on its rows, a thousand steps of it."""
    seconds = seconds_per_step * (steps or 1000)
    said = f"{steps or 1000:,} steps take about {format_duration(seconds)}, {seconds * devices / 3600:.2g} GPU-hours"
    return said + (", besides evaluating and saving" if steps else "; how many there are depends on the rows")


def verdict(plan: MemoryPlan) -> str:
    """Return whether it fits, in a line."""
    if plan.capacity_bytes is None:
        return "name a GPU to compare with: --gpu 24GiB"
    has = f"{plan.device} has {format_bytes(plan.capacity_bytes)}"
    if not plan.fits:
        missing = format_bytes(plan.peak_bytes - plan.capacity_bytes)
        return f"it does not fit: {has}, {missing} too little"
    return f"it may fit, tightly: {has}" if plan.is_tight else f"it fits: {has}"
