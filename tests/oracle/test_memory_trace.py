"""A step that is traced without weights holds what the same step holds when it is taken, byte for byte.

The truth is measured twice: by the tracker over real tensors, and by the allocator's own events, which also see what
kernels use inside.
"""

from __future__ import annotations

from typing import Any

import pytest
from memory_runs import in_a_process

PADDED = [256, 200]


def combination(model: str, tuning: str, optimizer: str, precision: str, **more: Any) -> dict[str, Any]:
    base = {"model": model, "tuning": tuning, "optimizer": optimizer, "precision": precision}
    return {**base, "checkpointed": False, "accumulated": 1, **more}


EVALUATED = {"data": {"eval": 0.5}, "training": {"eval_strategy": "steps", "eval_steps": 5}}
FAST = [
    combination("qwen3", "full", "adamw_torch", "bf16", lengths=PADDED, more=EVALUATED),
    combination("llama", "qlora", "adamw_8bit", "bf16", checkpointed=True, accumulated=2),
]
SLOW = [
    combination("gpt2", "full", "mezo", "float32"),
    combination("gemma2", "qalora", "adalomo", "pure"),
    combination("llama", "full", "lomo", "bf16", checkpointed=True, accumulated=2),
    combination("qwen3", "full", "adafactor", "float32", more={"data": {"packing": True}}),
    combination("gpt2", "qlora", "adamw_fused_backward", "float32", accumulated=2),
    combination("llama", "lora", "muon", "bf16", more={"tuning": {"use_dora": True, "lora_dropout": 0.1}}),
    combination("llama", "full", "galore_adamw", "float32"),
]
DEEP = [
    {**combination("llama", "full", "adamw_torch", "bf16"), "layers": 9, "device": "cuda"},
    {**combination("gemma2", "lora", "lomo", "float32", checkpointed=True), "layers": 10, "device": "cpu"},
]


def agrees(figures: dict[str, Any]) -> None:
    assert figures["predicted_bytes"] == figures["tracked_bytes"]
    assert figures["owners_agree"]
    assert figures["phases_agree"]
    assert figures["predicted_bytes"] == pytest.approx(figures["allocator_bytes"], rel=1e-3)


def test_traced_is_real() -> None:
    found = in_a_process("compare", FAST)
    for figures in found:
        agrees(figures)
    assert found[0]["phases"] == ["start", "forward", "backward", "optimizer", "evaluation"]


@pytest.mark.slow
@pytest.mark.parametrize("one", SLOW, ids=lambda one: f"{one['model']} {one['tuning']} {one['optimizer']}")
def test_more_methods_are_real(one: dict[str, Any]) -> None:
    agrees(in_a_process("compare", [one])[0])


@pytest.mark.slow
def test_few_layers_stand_for_all() -> None:
    like, in_pairs = in_a_process("depth", DEEP)
    assert like["few"] == like["every"]
    assert in_pairs["few"] == in_pairs["every"]
    assert (like["traced"], in_pairs["traced"]) == ([3, 5], [4, 6])


@pytest.mark.slow
def test_every_turn_is_real() -> None:
    hift = combination("llama", "x", "adamw_torch", "float32", tunings={"method": "hift"})
    found = in_a_process("turns", [hift])[0]
    assert len(found["traced"]) == 3  # the embedding, a layer, the head
    assert found["traced"] == found["real"]
    # On a GPU the state of the groups that rest is on the host: 8 bytes for each weight.
    assert all(here < there for here, there in zip(found["on_gpu"], found["traced"], strict=True))
    assert len({*found["host"]}) == 1
