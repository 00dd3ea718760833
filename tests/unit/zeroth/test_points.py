"""Seeds and directions."""

from __future__ import annotations

import pytest
import torch

from ftune.zeroth.points import _SLICE, Points, mixed, step_seed


def test_mixing_is_splitmix64() -> None:
    """The first output of the reference generator (Vigna's splitmix64.c) from the state 0."""
    assert mixed(0) == 0xE220A8397B1DCDAF


def test_seeds_fit_the_log_and_differ() -> None:
    seeds = [step_seed(seed, step) for seed in (0, 1, 2**40, -1) for step in range(5000)]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert len(set(seeds)) > len(seeds) - 5  # chance makes 20,000 of 2**32 collide 0.05 times


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5), (_SLICE + 7,)])
def test_directions_cover_each_place_once(shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    flat = torch.zeros(weight.numel())
    for where, z in Points("nearest").directions(weight, None, seed=1, number=2):
        flat[where] += z
    assert (flat != 0).sum() >= weight.numel() - 1
    again = torch.cat([z for _, z in Points("nearest").directions(weight, None, seed=1, number=2)])
    assert torch.equal(flat, again)


def test_chosen_places_take_the_first_numbers() -> None:
    """All of them chosen, z is that of the whole weight."""
    weight = torch.zeros(3 * _SLICE // 2)
    points, every = Points("nearest"), torch.arange(weight.numel(), dtype=torch.int32)
    whole = torch.cat([z for _, z in points.directions(weight, None, seed=5, number=0)])
    chosen = torch.cat([z for _, z in points.directions(weight, every, seed=5, number=0)])
    assert torch.equal(whole, chosen)
