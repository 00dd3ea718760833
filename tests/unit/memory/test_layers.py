"""The peaks of a deep model from those of shallow ones, and the file that a trace travels in."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftune.memory.events import Event, Owner, Trace, Work
from ftune.memory.layers import most, peaks_of, peaks_of_depth, period
from ftune.memory.peak import peak
from ftune.memory.written import read, write


def traced(layers: int, *, weight: int = 100, kept: int = 7, loss: int = 50) -> Trace:
    """Return a step of layers that each hold a weight, and keep something until the loss is there."""
    events, number = [], 0

    def add(size: int, owner: Owner, phase: str, module: str, operation: str) -> None:
        nonlocal number
        number += 1
        events.append(Event(number, size, owner, phase, module, operation))

    for _ in range(layers):
        add(weight, Owner.WEIGHT, "start", "", "")
    for layer in range(layers):
        add(kept, Owner.ACTIVATION, "forward", f"model.layers.{layer}.mlp", "mm")
    add(loss, Owner.LOGITS, "backward", "", "softmax")
    work = (Work("forward", "mm", "float32", layers, 10 * layers, 20 * layers),)
    return Trace(tuple(events), work, host_bytes=3)


def test_two_shallow_ones_stand_for_a_deep_one() -> None:
    asked: list[int] = []

    def trace_of(layers: int) -> Trace:
        asked.append(layers)
        return traced(layers)

    found = peaks_of_depth(trace_of, 80)
    assert asked == [3, 5]
    every = peaks_of(traced(80))
    assert {phase: one.size_bytes for phase, one in found.items()} == {
        phase: one.size_bytes for phase, one in every.items()
    }
    assert {phase: one.by_owner for phase, one in found.items()} == {
        phase: one.by_owner for phase, one in every.items()
    }
    assert most(found).size_bytes == 80 * 107 + 50


def test_a_shallow_one_is_traced_itself() -> None:
    asked: list[int] = []
    peaks_of_depth(lambda layers: asked.append(layers) or traced(layers), 4)  # type: ignore[func-returns-value]
    assert asked == [4]


def test_a_peak_that_moves_is_not_extended() -> None:
    """Where another operator makes the peak of more layers, deeper ones are looked at, and at last all of them."""
    asked: list[int] = []

    def trace_of(layers: int) -> Trace:
        asked.append(layers)
        trace = traced(layers)
        last = trace.events[-1]
        moved = Event(last.storage, last.size_bytes, last.owner, last.phase, "", f"kernel of {layers}")
        return Trace((*trace.events[:-1], moved), trace.work)

    found = peaks_of_depth(trace_of, 20)
    assert asked == [3, 5, 7, 20]
    assert found["backward"].operation == "kernel of 20"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 32}, 1),
        ({"n_layer": 12}, 1),
        ({"num_hidden_layers": 6, "layer_types": ["sliding", "full"] * 3}, 2),
        ({"num_hidden_layers": 6, "layer_types": ["sliding"] * 5 + ["full"]}, None),
        ({"num_hidden_layers": 26, "layer_types": (["sliding"] * 5 + ["full"]) * 4 + ["sliding"] * 2}, 6),
        ({"num_hidden_layers": 6, "first_k_dense_replace": 1}, None),
        ({"text_config": {"num_hidden_layers": 4}, "vision_config": {}}, 1),
        ({"vocab_size": 10}, None),
    ],
)
def test_period(config: dict[str, object], expected: int | None) -> None:
    assert period(config) == expected


def test_a_written_trace_is_the_same(tmp_path: Path) -> None:
    trace = traced(5)
    write(trace, tmp_path / "trace")
    assert read(tmp_path / "trace") == trace
    assert peak(read(tmp_path / "trace")) == peak(trace)
