"""Packing: nothing lost, nothing doubled, nothing too long, nearly nothing wasted."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftune.data.pack import best_fit_decreasing


@given(st.lists(st.integers(0, 50), max_size=80))
def test_every_row_is_packed_once_and_fits(lengths: list[int]) -> None:
    groups = best_fit_decreasing(lengths, 50)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in group) <= 50 for group in groups)
    assert all(group == sorted(group) for group in groups)
    # Best fit opens a sequence only when no other has room, so no two can be less than half full.
    assert sum(2 * sum(lengths[row] for row in group) <= 50 for group in groups) <= 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_like_the_textbook(lengths: list[int]) -> None:
    """The same number of sequences as the definition, tried one by one."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda at: rooms[at])] -= length
        else:
            rooms.append(30 - length)
    groups = best_fit_decreasing(lengths, 30)
    assert sorted(30 - sum(lengths[row] for row in group) for group in groups) == sorted(rooms)


def test_a_row_longer_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 11 tokens"):
        best_fit_decreasing([3, 11], 10)


def test_the_same_twice_and_quickly() -> None:
    drawn = random.Random(0)
    lengths = [drawn.randint(1, 2048) for _ in range(50_000)]
    first = best_fit_decreasing(lengths, 2048)
    assert first == best_fit_decreasing(lengths, 2048)
    assert sum(lengths) / (2048 * len(first)) > 0.98
