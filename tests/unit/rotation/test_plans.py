"""Which units move when: each has its turn, chance is private, and a saved plan goes on where it was."""

from __future__ import annotations

import json
import random

import pytest

from ftune.rotation.plans import Draws, Plan, Turns, shuffled


def walk(plan: Plan, steps: int) -> list[tuple[int, ...]]:
    seen = []
    for _ in range(steps):
        seen.append(plan.active)
        plan.advance()
    return seen


def test_turns_in_order() -> None:
    sets = [(0, 1), (2, 3), (4,)]
    assert walk(Turns(sets), 7) == [*sets, *sets, (0, 1)]
    assert walk(Turns(sets, interval=2), 7) == [(0, 1), (0, 1), (2, 3), (2, 3), (4,), (4,), (0, 1)]


def test_a_new_order_for_each_sweep() -> None:
    seen = walk(Turns([(number,) for number in range(6)], seed=3), 60)
    sweeps = [seen[start : start + 6] for start in range(0, 60, 6)]
    assert all(sorted(sweep) == [(number,) for number in range(6)] for sweep in sweeps)
    assert len({tuple(sweep) for sweep in sweeps}) > 5


def test_draws_are_even() -> None:
    """Each layer is drawn with probability count / layers: 6 000 draws of 2 in 5 lie within 5 standard deviations."""
    seen = walk(Draws((5, 6), range(5), count=2, interval=1, seed=0), 6000)
    for number in range(5):
        times = sum(number in active for active in seen)
        assert abs(times - 2400) < 5 * (6000 * 0.4 * 0.6) ** 0.5
    assert all(len(active) == 4 and {5, 6} <= set(active) for active in seen)


def plans() -> list[Plan]:
    blocks = [(number,) for number in range(5)]
    return [
        Turns(blocks),
        Turns(blocks, interval=3, seed=1),
        Draws((5,), range(5), count=2, interval=3, seed=1),
    ]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("steps", [0, 1, 4, 14, 15, 16])
def test_a_saved_plan_goes_on(number: int, steps: int) -> None:
    whole, first, second = (plans()[number] for _ in range(3))
    walk(first, steps)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert walk(second, 30) == walk(whole, steps + 30)[steps:]


def test_chance_is_private() -> None:
    before = random.getstate()
    assert shuffled(9, seed=1) == shuffled(9, seed=1)
    assert shuffled(9, seed=1) != shuffled(9, seed=2)
    assert shuffled(9, seed=1) != shuffled(9, seed=1, draw=1)
    assert random.getstate() == before
