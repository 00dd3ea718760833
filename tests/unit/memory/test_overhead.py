"""What is added to the tensors, and what follows for a GPU."""

from __future__ import annotations

import pytest

from ftune.memory.events import Event, Owner
from ftune.memory.gpus import known_gpus
from ftune.memory.overhead import CONTEXTS, MARGIN, context_of, need, with_workspaces, workspace_bytes
from ftune.memory.replay import Replay, replay

MIB = 1024 * 1024


def event(storage: int, size: int, phase: str) -> Event:
    return Event(storage, size, Owner.ACTIVATION, phase, "", "aten::mm")


EVENTS = (event(0, 100 * MIB, "start"), event(1, 50 * MIB, "forward"), event(1, -50 * MIB, "backward"))


@pytest.mark.parametrize(
    ("capability", "size"),
    [((7, 5), 8_519_680), ((8, 0), 8_519_680), ((9, 0), 32 * MIB), ((12, 0), 32 * MIB), ((9, 4), 128 * MIB)],
)
def test_workspaces_lie_behind_what_is_there_at_the_start(capability: tuple[int, int], size: int) -> None:
    assert workspace_bytes(capability) == size
    events = with_workspaces(EVENTS, capability)
    assert [one.size_bytes for one in events] == [100 * MIB, size, size, 50 * MIB, -50 * MIB]
    assert replay(events).peak_allocated_bytes == 150 * MIB + 2 * size
    assert len({one.storage for one in events}) == 4


def test_a_trace_that_is_all_start() -> None:
    assert [one.storage for one in with_workspaces(EVENTS[:1], (8, 0))] == [0, -1, -2]
    assert len(with_workspaces((), (8, 0))) == 2


def test_what_a_run_needs() -> None:
    replayed, least = Replay(1000 * MIB, 1200 * MIB, 0, 0, None), 1050 * MIB
    context = context_of((9, 0))
    one = need(least, replayed.peak_reserved_bytes, (9, 0))
    assert one.low_bytes == (1050 + context.low_mib) * MIB
    assert one.high_bytes == int((1200 * (1 + MARGIN) + context.high_mib) * MIB)
    assert one.fits(one.high_bytes) is True
    assert one.fits(one.high_bytes - 1) is None
    assert one.fits(one.low_bytes) is None
    assert one.fits(one.low_bytes - 1) is False
    several = need(least, replayed.peak_reserved_bytes, (9, 0), gpus=8)
    assert several.low_bytes > one.low_bytes
    assert several.high_bytes > one.high_bytes


def test_contexts() -> None:
    for context in CONTEXTS.values():
        assert 0 < context.low_mib < context.high_mib
        assert context.source
    unknown = context_of((0, 0))
    assert unknown.low_mib <= min(context.low_mib for context in CONTEXTS.values())
    assert unknown.high_mib >= max(context.high_mib for context in CONTEXTS.values())
    assert {gpu.capability for gpu in known_gpus()} - set(CONTEXTS) == {(9, 4)}
