"""How long a whole run takes: from the time of a step, where the number of steps is known."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest

from ftune.machine import Machine
from ftune.memory.overhead import Need
from ftune.memory.plan import MemoryPlan
from ftune.memory.shown import lines_of, show
from ftune.recipe import load
from ftune.resolve import resolve

PLAN = MemoryPlan(
    parts={"weights": 100, "overhead": 20},
    phases={"forward": 100},
    peak_at="forward",
    allocated_bytes=100,
    need=Need(120, 130),
    device="a GPU",
    capacity_bytes=1000,
    host_bytes=0,
    disk_bytes=7,
    tokens_per_step=2048,
    seconds_per_step=1.8,
)


def with_steps(**changes: Any) -> MemoryPlan:
    return dataclasses.replace(PLAN, **changes)


def test_a_run_of_known_steps() -> None:
    plan = with_steps(steps=5000)
    assert plan.run_seconds == pytest.approx(9000)
    assert plan.gpu_hours == pytest.approx(2.5)
    assert plan.as_json()["gpu_hours"] == plan.gpu_hours
    assert "5,000 steps take about 2:30:00, 2.5 GPU-hours, besides evaluating and saving" in lines_of(plan)


def test_steps_that_depend_on_the_rows() -> None:
    assert (PLAN.run_seconds, PLAN.gpu_hours) == (None, None)
    assert "1,000 steps take about 30:00, 0.5 GPU-hours; how many there are depends on the rows" in lines_of(PLAN)


def test_without_a_speed_nothing_is_said_of_time() -> None:
    plan = with_steps(steps=5000, seconds_per_step=None)
    assert (plan.run_seconds, plan.gpu_hours) == (None, None)
    assert not [line for line in lines_of(plan) if "steps take" in line]


def test_the_verdict_comes_last() -> None:
    values = {"model": {"model_name_or_path": "m"}, "data": {"train": "x"}, "training": {"output_dir": "r"}}
    spec = resolve(load(values), Machine(packages={"torch": "2"}), fingerprints=False)
    stream = io.StringIO()
    show(spec, PLAN, stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("m: full, adamw_torch")
    assert lines[-1] == "it fits: a GPU has 1000 B"
