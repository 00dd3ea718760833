"""A step in columns: no peak is lost, every column is an instant that there was, and the phases keep their order."""

from __future__ import annotations

import random

import pytest

from ftune.memory.events import Event, Owner, Trace
from ftune.memory.live import live
from ftune.memory.peak import peak


def made_up(seed: int) -> Trace:
    """Return a step in which storages of all owners come and go by chance."""
    chance, owners = random.Random(seed), list(Owner)
    events = [Event(number, chance.randint(1, 500), chance.choice(owners), "start", "", "") for number in range(5)]
    alive = list(events)
    for phase in ("forward", "backward", "forward", "backward", "optimizer"):
        for _ in range(chance.randint(1, 80)):
            if alive and chance.random() < 0.45:
                gone = alive.pop(chance.randrange(len(alive)))
                events.append(Event(gone.storage, -gone.size_bytes, gone.owner, phase, "", ""))
            else:
                alive.append(Event(len(events) + 10, chance.randint(1, 500), chance.choice(owners), phase, "", ""))
                events.append(alive[-1])
    return Trace(tuple(events), ())


@pytest.mark.parametrize("columns", [1, 7, 40, 1000])
def test_columns_show_the_fullest_instants(columns: int) -> None:
    for seed in range(20):
        trace = made_up(seed)
        found, highest = live(trace, columns), peak(trace)
        assert max(found.totals) == highest.size_bytes
        at = found.totals.index(highest.size_bytes)
        assert {owner: values[at] for owner, values in found.by_owner.items()} == highest.by_owner
        assert len(found.totals) <= columns
        instants, held = [], dict.fromkeys(Owner, 0)
        for event in trace.events:
            held[event.owner] += event.size_bytes
            instants.append(tuple(held.values()))
        assert {tuple(column) for column in zip(*found.by_owner.values(), strict=True)} <= set(instants)


def test_phases_come_in_their_order() -> None:
    found = live(made_up(3), 1000)
    assert [one.phase for one in found.stretches] == ["forward", "backward", "forward", "backward", "optimizer"]
    assert found.stretches[0].first == 0
    assert found.stretches[-1].last == len(found.totals)
    assert all(one.last == other.first for one, other in zip(found.stretches, found.stretches[1:], strict=False))
