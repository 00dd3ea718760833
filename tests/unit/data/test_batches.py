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


def test_a_row_longer_than_the_budget_has_a_batch_of_its_own() -> None:
    lengths = numpy.array([5, 90, 5, 5, 0, 0])
    batches = batches_of(lengths, rows=1, most_tokens=40, ranks=1, seed=0)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(6))
    assert [1] in [batch.tolist() for batch in batches]


def test_rows_without_tokens_and_no_rows_at_all() -> None:
    for most in (None, 40):
        assert batches_of(numpy.zeros(0, dtype=numpy.int32), rows=2, most_tokens=most, ranks=3, seed=0) == []
        empty = batches_of(numpy.zeros(5, dtype=numpy.int32), rows=2, most_tokens=most, ranks=1, seed=0)
        assert sorted(row for batch in empty for row in batch.tolist()) == list(range(5))
    planned = PlannedBatches([], numpy.zeros(0, dtype=numpy.int32), rank=0, ranks=2, seed=0)
    assert (len(planned), list(planned)) == (0, [])


@given(LENGTHS, st.integers(1, 4), st.sampled_from([None, 10, 60]), st.integers(0, 3))
def test_each_epoch_shows_every_rank_as_many_batches_and_all_of_them(
    lengths: numpy.ndarray, ranks: int, budget: int | None, epoch: int
) -> None:
    batches = batches_of(lengths, rows=3, most_tokens=budget, ranks=ranks, seed=4)
    planned = [PlannedBatches(batches, lengths, rank=rank, ranks=ranks, seed=4) for rank in range(ranks)]
    for rank in planned:
        rank.set_epoch(epoch)
    shown = [list(rank) for rank in planned]
    assert [len(each) for each in shown] == [len(rank) for rank in planned] == [len(batches) // ranks] * ranks
    assert sorted(map(tuple, (batch for each in shown for batch in each))) == sorted(map(tuple, batches))
    # What the ranks do in one step stood side by side: rows of like length, so that none waits.
    steps = {tuple(tuple(batches[at + rank].tolist()) for rank in range(ranks)) for at in range(0, len(batches), ranks)}
    assert {tuple(map(tuple, step)) for step in zip(*shown, strict=True)} == steps


def test_the_seed_decides_which_rows_meet_and_in_which_order() -> None:
    lengths = numpy.full(400, 7)
    one, same, other = (
        [batch.tolist() for batch in batches_of(lengths, rows=4, most_tokens=None, ranks=1, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other
    assert sorted(map(sorted, one)) != [list(range(at, at + 4)) for at in range(0, 400, 4)], "rows of the file's order"
    batches = batches_of(lengths, rows=4, most_tokens=None, ranks=1, seed=1)
    orders = [list(PlannedBatches(batches, lengths, rank=0, ranks=1, seed=seed)) for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_rows_of_like_length_do_not_always_meet() -> None:
    """Rows are sorted in stretches of a few batches: sorted all at once, the same rows would always share a batch."""
    lengths = numpy.arange(1, 2001)
    for most in (None, 4000):
        batches = batches_of(lengths, rows=4, most_tokens=most, ranks=1, seed=0)
        spread = [int(lengths[batch].max() - lengths[batch].min()) for batch in batches if len(batch) > 1]
        assert numpy.mean(spread) > 5


def test_chance_draws_each_row_once() -> None:
    batches = random_batches(103, 10, seed=1)
    assert [len(batch) for batch in batches] == [10] * 10 + [3]
    assert sorted(numpy.concatenate(batches).tolist()) == list(range(103))
    assert numpy.concatenate(batches).tolist() != list(range(103))


@given(LENGTHS, st.integers(2, 6))
def test_ranks_get_equal_numbers_by_dividing_the_largest_batches(lengths: numpy.ndarray, ranks: int) -> None:
    alone = batches_of(lengths, rows=4, most_tokens=None, ranks=1, seed=1)
    shared = batches_of(lengths, rows=4, most_tokens=None, ranks=ranks, seed=1)
    added = -len(alone) % ranks
    assert len(shared) == len(alone) + added
    divided = [batch for batch in map(list, alone) if batch not in [other.tolist() for other in shared]]
    kept = [batch for batch in map(list, alone) if batch in [other.tolist() for other in shared]]
    assert not divided or min(map(len, divided)) >= max(map(len, kept), default=0)
