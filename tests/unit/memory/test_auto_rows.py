"""What `per_device_train_batch_size: auto` becomes, on made-up devices, against trying every micro-batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ftune.errors import Problem as Named
from ftune.errors import RunError
from ftune.machine import Gpu, Machine
from ftune.memory.auto_rows import PASSES, ROWS, choose_rows
from ftune.memory.gpus import find_gpu
from ftune.memory.overhead import Need
from ftune.memory.plan import MemoryPlan
from ftune.recipe import load
from ftune.resolve import RunSpec, resolve

_PACKAGES = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"), "1")


def spec_of(**training: Any) -> RunSpec:
    values: dict[str, Any] = {
        "model": {"model_name_or_path": "org/model"},
        "data": {"train": "rows.jsonl"},
        "training": {"output_dir": "runs/x", "per_device_train_batch_size": "auto", **training},
    }
    return resolve(load(values), machine(1), fingerprints=False)


def machine(size: int) -> Machine:
    return Machine(gpus=(Gpu("a GPU", size, (8, 0)),), packages=_PACKAGES)


def plan_on(size: int, spec: RunSpec) -> MemoryPlan:
    """Return a plan in which each row takes 10 bytes at the least and 12 at the most."""
    rows = spec.recipe.training.per_device_train_batch_size
    assert isinstance(rows, int)
    need = Need(100 + 10 * rows, 100 + 12 * rows)
    return MemoryPlan(
        parts={"weights": need.low_bytes, "overhead": 0},
        phases={},
        peak_at="",
        allocated_bytes=need.low_bytes,
        need=need,
        device="made up",
        capacity_bytes=size,
        host_bytes=0,
        disk_bytes=0,
        tokens_per_step=1,
        seconds_per_step=None,
    )


def chosen(size: int, **training: Any) -> tuple[int, int, str]:
    facts = dataclasses.replace(find_gpu("24GiB"), memory_bytes=2**40)  # so that no bound plays a part
    rows, passes = choose_rows(spec_of(**training), lambda one: plan_on(size, one), {}, facts, machine(size))
    assert (rows.key, passes.key) == (ROWS, PASSES)
    return rows.value, passes.value, rows.why


@pytest.mark.parametrize("passes", [1, 3])
def test_the_largest_that_fits_of_a_step_that_stays(passes: int) -> None:
    whole, found = 8 * passes, set()
    divisors = [rows for rows in range(whole, 0, -1) if whole % rows == 0]
    for size in range(100, 100 + 12 * whole + 2):
        rows, times, why = chosen(size, gradient_accumulation_steps=passes)
        with_margin = [count for count in divisors if 100 + 12 * count <= size]
        tightly = [count for count in divisors if 100 + 10 * count <= size]
        assert rows == (with_margin or tightly or [1])[0]
        assert rows * times == whole
        assert ("tightly" in why) == (not with_margin and bool(tightly))
        assert ("not even so few" in why) == (not tightly)
        found.add(rows)
    assert found == set(divisors)


def test_an_optimizer_that_adds_nothing_up_takes_the_step_whole() -> None:
    assert chosen(10_000, optim="lomo")[:2] == (8, 1)
    assert chosen(130, optim="lomo")[:2] == (8, 1)  # it does not fit, and no smaller one is the same step


def test_what_cannot_be_planned_is_said() -> None:
    def fails(one: RunSpec) -> MemoryPlan:
        raise RunError(Named("trace-failed", "no step to follow"))

    with pytest.raises(RunError, match="no step to follow"):
        choose_rows(spec_of(), fails, {}, find_gpu("24GiB"), machine(2**30))
