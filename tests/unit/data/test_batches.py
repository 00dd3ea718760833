"""Batches of like length and batches of so many tokens."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftune.data.batches import PlannedBatches, batches_of, padding_share, random_batches

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120).map(numpy.array)


@given(LENGTHS, st.integers(1, 3), st.sampled_from([None, 40, 100]))
def test_each_row_is_in_a_batch_that_holds_it(lengths: numpy.ndarray, ranks: int, budget: int | None) -> None:
    batches = batches_of(lengths, rows=4, most_tokens=budget, ranks=ranks, seed=1)
    assert len(batches) % ranks == 0
    rows = numpy.concatenate(batches).tolist()
    assert set(rows) == set(range(len(lengths)))
    # A row is seen twice only where there are not enough rows to give every rank one.
    assert len(rows) - len(lengths) < ranks
    for batch in batches:
        if budget is None:
            assert 1 <= len(batch) <= 4
        else:
            assert len(batch) * lengths[batch].max() <= budget


def test_it_pads_less_than_chance() -> None:
    lengths = numpy.random.default_rng(0).integers(1, 500, 4000)
    grouped = batches_of(lengths, rows=8, most_tokens=None, ranks=1, seed=0)
    budget = batches_of(lengths, rows=8, most_tokens=4000, ranks=1, seed=0)
    chance = random_batches(4000, 8, seed=0)
    assert padding_share(lengths, chance) > 0.4
    assert padding_share(lengths, grouped) < 0.03
    assert padding_share(lengths, budget) < 0.03


def test_padding_share_is_the_share_of_empty_places() -> None:
    lengths = numpy.array([3, 1, 2])
    assert padding_share(lengths, [numpy.array([0, 1]), numpy.array([2])]) == 1 - 6 / 8


def test_ranks_share_out_the_batches_and_epochs_differ() -> None:
    lengths = numpy.random.default_rng(0).integers(1, 50, 100)
    batches = batches_of(lengths, rows=4, most_tokens=None, ranks=2, seed=7)
    ranks = [PlannedBatches(batches, lengths, rank=rank, ranks=2, seed=7) for rank in range(2)]
    first = [list(rank) for rank in ranks]
    assert len(first[0]) == len(first[1]) == len(ranks[0])
    assert sorted(row for rank in first for batch in rank for row in batch) == list(range(100))
    assert [list(rank) for rank in ranks] == first, "the same epoch twice"
    ranks[0].set_epoch(1)
    assert list(ranks[0]) != first[0]
    assert sorted(map(sorted, ranks[0])) == sorted(map(sorted, first[0]))


@pytest.mark.parametrize("most", [None, 300])
def test_the_largest_batch_comes_first_once(most: int | None) -> None:
    lengths = numpy.random.default_rng(3).integers(1, 99, 200)
    lengths[17] = 250
    batches = batches_of(lengths, rows=4, most_tokens=most, ranks=2, seed=1)
    ranks = [PlannedBatches(batches, lengths, rank=rank, ranks=2, seed=1) for rank in range(2)]
    places = [max(len(batch) * lengths[batch].max() for batch in step) for step in zip(*ranks, strict=True)]
    assert places[0] == max(len(batch) * lengths[batch].max() for batch in batches)
    assert sorted(row for rank in ranks for batch in rank for row in batch) == list(range(200))
    for rank in ranks:
        rank.set_epoch(1)
    later = [max(len(batch) * lengths[batch].max() for batch in step) for step in zip(*ranks, strict=True)]
    assert later[0] != places[0], "later epochs know already that it fits"
