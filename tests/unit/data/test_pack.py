"""Packing: every row once, none cut, hardly a place empty."""

from __future__ import annotations

import itertools

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftune.data.pack import packed


@given(st.lists(st.integers(0, 50), max_size=80))
def test_every_row_is_packed_once_and_fits(lengths: list[int]) -> None:
    groups = [group.tolist() for group in packed(numpy.array(lengths, dtype=int), 50)]
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in group) <= 50 for group in groups)
    assert all(group == sorted(group) for group in groups)
    assert groups == sorted(groups)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_the_longest_row_is_in_the_fullest_sequence_there_is(lengths: list[int]) -> None:
    """Compared with every subset, tried one by one."""
    longest = max(lengths)
    others = sorted(lengths)
    others.remove(longest)
    subsets = itertools.chain.from_iterable(itertools.combinations(others, size) for size in range(len(others) + 1))
    fullest = max(total for subset in subsets if (total := longest + sum(subset)) <= 30)
    groups = [group.tolist() for group in packed(numpy.array(lengths), 30)]
    assert fullest in [sum(lengths[row] for row in group) for group in groups if longest in [lengths[r] for r in group]]


def test_a_row_longer_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 11 tokens"):
        packed(numpy.array([3, 11]), 10)


@pytest.mark.parametrize(
    ("low", "high", "capacity"), [(1, 2048, 2048), (60, 100, 512), (150, 250, 2048), (1, 512, 2048)]
)
def test_the_same_twice_and_nearly_full(low: int, high: int, capacity: int) -> None:
    lengths = numpy.random.default_rng(0).integers(low, high + 1, 20_000)
    first = packed(lengths, capacity)
    assert numpy.array_equal(first.rows, packed(lengths, capacity).rows)
    assert lengths.sum() / (capacity * len(first)) > 0.99


def test_rows_without_tokens_share_one_sequence() -> None:
    groups = packed(numpy.array([0, 7, 0, 7, 0]), 7)
    assert [group.tolist() for group in groups] == [[0, 2, 4], [1], [3]]
    assert [group.tolist() for group in packed(numpy.zeros(3, dtype=int), 7)] == [[0, 1, 2]]


def test_there_is_no_sequence_beyond_the_last() -> None:
    groups = packed(numpy.array([3, 4]), 5)
    for at in (-1, 2):
        with pytest.raises(IndexError):
            groups[at]
