"""The plan of a run that is about to begin: of its own longest rows, on this machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from ftune import plugin
from ftune.errors import Problem
from ftune.machine import Machine
from ftune.memory.ask import config_of_model, plan_of
from ftune.memory.gpus import of_this_machine
from ftune.memory.plan import MemoryPlan
from ftune.resolve import RunSpec, with_training
from ftune.training.foretold import Forecast, LargestBatches, spoken
from ftune.units import format_bytes


def foresee(spec: RunSpec, largest: LargestBatches, *, machine: Machine) -> Forecast:
    """Return the plan of a decided run, and where it cannot fit a change with which it does.

    Raises RecipeError and RunError for a model that cannot be traced.
    """
    plan = _plan(spec, largest, machine)
    lines = tuple(_lines(plan, on_gpu=bool(machine.gpus)))
    return Forecast(plan.allocated_bytes, plan.parts, lines, _refusal(spec, largest, plan, machine))


def _plan(spec: RunSpec, largest: LargestBatches, machine: Machine) -> MemoryPlan:
    gpu = of_this_machine(machine.gpus[0]) if machine.gpus else None
    return plan_of(
        spec,
        config_of_model(spec.recipe.model),
        gpu,
        machine,
        lengths=largest.train,
        evaluated=largest.evaluated,
        learned=largest.learned,
    )


def _lines(plan: MemoryPlan, *, on_gpu: bool) -> Iterator[str]:
    needed, of = format_bytes(plan.peak_bytes), f"of {_capacity(plan)} that {plan.device} has"
    yield f"plan: {needed} needed {of}; most in {plan.peak_at}"
    yield f"plan: {spoken(plan.parts)}"
    if plan.is_tight:
        yield f"plan: tight; up to {format_bytes(plan.need.high_bytes)} may be taken"
    if not on_gpu:
        yield "plan: of tensors; peak_memory_bytes is the resident memory of the process, with libraries besides"


def _capacity(plan: MemoryPlan) -> str:
    return format_bytes(plan.capacity_bytes) if plan.capacity_bytes else "the memory"


def _refusal(spec: RunSpec, largest: LargestBatches, plan: MemoryPlan, machine: Machine) -> Problem | None:
    if plan.fits is not False:
        return None
    longest = f"{len(largest.train)} x {max(largest.train):,} tokens"
    what = f"the largest batch, of {longest}, does not fit: {format_bytes(plan.peak_bytes)} are needed, "
    what += f"and {plan.device} has {_capacity(plan)}"
    fix = f"{_change(spec, largest, plan, machine)}; or try it all the same: --force"
    return Problem("plan-too-large", what, why=f"at the peak, in {plan.peak_at}: {spoken(plan.parts)}", fix=fix)


def _change(spec: RunSpec, largest: LargestBatches, plan: MemoryPlan, machine: Machine) -> str:
    """Return the first of a few changes that keep what is learned with which the run fits, or what else there is."""
    assert plan.capacity_bytes is not None
    stays = sum(plan.parts[part] for part in ("weights", "gradients", "optimizer", "overhead"))
    if stays < plan.capacity_bytes:
        for said, smaller, batches in _smaller(spec, largest):
            found = _plan(smaller, batches, machine)
            if found.fits:
                return f"set {said}, which needs {format_bytes(found.peak_bytes)}"
    frozen = plugin.tuning(spec.recipe.tuning.method).frozen_base
    other = "a smaller model" if frozen else "tuning: {method: lora}, or qlora"
    return f"no smaller batch fits: set {other}; `ftune plan RECIPE` says what that needs"


def _smaller(spec: RunSpec, largest: LargestBatches) -> Iterator[tuple[str, RunSpec, LargestBatches]]:
    """Yield smaller runs that learn the same: half the rows at once, a quarter, layers computed twice, and both."""
    training, method = spec.recipe.training, plugin.optimizer(spec.recipe.optimizer.method)
    rows = training.per_device_train_batch_size
    parted = training.max_tokens_per_batch is None and method.accumulates(spec.recipe.optimizer.options)
    twice = not training.gradient_checkpointing and method.gradients is not plugin.Gradients.NONE
    ways = [(2, False), (4, False), (1, True), (rows, True)]
    for parts, checkpointed in ways:
        if (parts > 1 and not parted) or parts > rows or (checkpointed and not twice):
            continue
        changes: dict[str, Any] = {"gradient_checkpointing": True} if checkpointed else {}
        if parts > 1:
            changes["per_device_train_batch_size"] = math.ceil(rows / parts)
            changes["gradient_accumulation_steps"] = training.gradient_accumulation_steps * parts
        smaller = with_training(spec, **changes)
        said = " with ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
        yield said, smaller, dataclasses.replace(largest, train=largest.train[: math.ceil(len(largest.train) / parts)])
