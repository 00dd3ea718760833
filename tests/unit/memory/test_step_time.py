"""The roofline by hand: what bounds an operator, and what bounds a phase."""

from __future__ import annotations

import pytest

from ftune.memory.events import Work
from ftune.memory.gpus import GpuFacts, find_gpu
from ftune.memory.step_time import (
    EFFICIENCIES,
    LEAST_SECONDS,
    START_SECONDS,
    gpu_seconds,
    kind_of,
    step_time,
)

PLAIN = GpuFacts(
    "plain",
    1,
    memory_bytes_per_second=1e12,
    flops_per_second={"float32": 1e13, "tf32": 4e13, "bfloat16": 1e14},
)


def product(**more: object) -> Work:
    values = {"phase": "forward", "operation": "aten::mm", "dtype": "bfloat16", "count": 10}
    return Work(**{**values, "flops": 10**13, "moved_bytes": 10**9, **more})  # type: ignore[arg-type]


def test_a_product_is_bound_by_its_multiplications() -> None:
    rate = EFFICIENCIES["product"].flops
    assert gpu_seconds(product(), PLAIN) == pytest.approx(0.1 / rate)
    assert gpu_seconds(product(dtype="float32"), PLAIN) == pytest.approx(1 / rate)
    assert gpu_seconds(product(dtype="float32"), PLAIN, tf32=True) == pytest.approx(0.25 / rate)
    # A GPU without bfloat16 or TF32 computes in float32.
    assert gpu_seconds(product(dtype="bfloat16"), find_gpu("t4")) == pytest.approx(10 / 8.1 / rate)
    assert gpu_seconds(product(dtype="float32"), find_gpu("t4"), tf32=True) == pytest.approx(10 / 8.1 / rate)


def test_an_operator_without_products_is_bound_by_its_bytes() -> None:
    work = product(operation="aten::add.Tensor", flops=0, moved_bytes=10**12)
    assert gpu_seconds(work, PLAIN) == pytest.approx(1 / EFFICIENCIES["other"].bandwidth)


def test_a_thin_product_is_bound_by_its_bytes() -> None:
    work = product(flops=10**9, moved_bytes=10**11)
    assert gpu_seconds(work, PLAIN) == pytest.approx(0.1 / EFFICIENCIES["product"].bandwidth)


def test_small_operators_cost_their_start() -> None:
    small = product(operation="aten::mul", flops=0, moved_bytes=1000, count=1000)
    assert gpu_seconds(small, PLAIN) == pytest.approx(1000 * LEAST_SECONDS)
    step = step_time([small, product(phase="backward", count=1)], PLAIN)
    assert step.by_phase["forward"] == pytest.approx(1000 * START_SECONDS)
    assert step.by_phase["backward"] == pytest.approx(0.1 / EFFICIENCIES["product"].flops)
    assert step.waiting == pytest.approx(1000 * (START_SECONDS - LEAST_SECONDS))
    assert step.seconds == pytest.approx(sum(step.by_phase.values()))


def test_what_is_beside_the_steps_does_not_count() -> None:
    step = step_time([product(), product(phase="evaluation"), product(phase="start")], PLAIN)
    assert set(step.by_phase) == {"forward"}
    assert step.seconds == pytest.approx(0.1 / EFFICIENCIES["product"].flops)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::mm", "product"),
        ("aten::addmm.default", "product"),
        ("aten::linear_backward", "product"),
        ("aten::_scaled_dot_product_flash_attention", "attention"),
        ("aten::_scaled_dot_product_efficient_attention_backward", "attention"),
        ("aten::mul.Tensor", "other"),
        ("aten::_fused_adamw_", "other"),
        ("", "other"),
    ],
)
def test_kinds(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


def test_a_step_of_one_product() -> None:
    assert step_time([product()], PLAIN).seconds == pytest.approx(1 / 7)


def test_every_efficiency_is_a_part_and_has_a_reason() -> None:
    for efficiency in EFFICIENCIES.values():
        assert 0 < efficiency.flops <= 1
        assert 0 < efficiency.bandwidth <= 1
        assert efficiency.reason
