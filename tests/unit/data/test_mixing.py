"""Mixes: the shares that were asked for, every row where it was promised, the same from the same seed."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftune.data.mixing import drawn_forever, mix, weights_of

COUNTS = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@given(COUNTS)
def test_without_weights_each_row_comes_once_in_order(counts: list[int]) -> None:
    made = mix(counts, None, stop="all_exhausted", seed=3)
    expected = [(source, row) for source, count in enumerate(counts) for row in range(count)]
    assert list(zip(made.sources.tolist(), made.rows.tolist(), strict=True)) == expected


@given(COUNTS, st.data())
def test_every_row_is_seen_before_one_is_seen_again(counts: list[int], data: st.DataObject) -> None:
    raw = [data.draw(st.floats(0.2, 5)) for _ in counts]
    weights = [value / sum(raw) for value in raw]
    made = mix(counts, weights, stop="all_exhausted", seed=1)
    for source, count in enumerate(counts):
        seen = Counter(made.rows[made.sources == source].tolist())
        assert set(seen) == set(range(count)), "a row was never drawn"
        assert max(seen.values()) - min(seen.values()) <= 1
    short = mix(counts, weights, stop="first_exhausted", seed=1)
    for source in range(len(counts)):
        seen = Counter(short.rows[short.sources == source].tolist())
        assert max(seen.values()) == 1, "a row came twice though the first source was to end it"


def test_the_shares_are_those_of_the_weights_from_the_beginning_on() -> None:
    made = mix([1000, 3000, 500], [0.5, 0.27, 0.23], stop="all_exhausted", seed=0)
    for end in (100, 1000, len(made)):
        found = Counter(made.sources[:end].tolist())
        assert [found[source] / end for source in range(3)] == pytest.approx([0.5, 0.27, 0.23], abs=0.02)
    again = mix([1000, 3000, 500], [0.5, 0.27, 0.23], stop="all_exhausted", seed=0)
    other = mix([1000, 3000, 500], [0.5, 0.27, 0.23], stop="all_exhausted", seed=1)
    assert numpy.array_equal(made.rows, again.rows)
    assert not numpy.array_equal(made.rows, other.rows)


def test_temperature_evens_out() -> None:
    assert weights_of([None, None], [900, 100], 1.0) == pytest.approx([0.9, 0.1])
    assert weights_of([None, None], [900, 100], 2.0) == pytest.approx([0.75, 0.25])
    assert weights_of([None, None], [900, 100], 1e9) == pytest.approx([0.5, 0.5])
    assert weights_of([None, 3.0], [900, 100], None) == pytest.approx([0.25, 0.75])
    assert weights_of([None, None], [900, 100], None) is None


def test_streams_draw_by_weight() -> None:
    drawn = drawn_forever([0.8, 0.2], seed=5)
    found = Counter(next(drawn) for _ in range(20_000))
    assert found[0] / 20_000 == pytest.approx(0.8, abs=0.01)


@given(COUNTS, st.data())
def test_each_source_gets_its_share_of_the_rows(counts: list[int], data: st.DataObject) -> None:
    raw = [data.draw(st.floats(0.2, 5)) for _ in counts]
    weights = [value / sum(raw) for value in raw]
    for stop, ends in (("first_exhausted", min), ("all_exhausted", max)):
        made = mix(counts, weights, stop=stop, seed=2)
        whole = ends(count / weight for count, weight in zip(counts, weights, strict=True))
        found = [int((made.sources == source).sum()) for source in range(len(counts))]
        for number, weight in zip(found, weights, strict=True):
            assert number >= 1, "a source is not there at all"
            assert number == 1 or abs(number - whole * weight) <= 0.5 + 1e-6


def test_part_of_a_source_is_drawn_from_all_of_it_and_keeps_its_order() -> None:
    parts = []
    for seed in range(30):
        made = mix([40, 40, 4], [0.45, 0.45, 0.1], stop="first_exhausted", seed=seed)
        first, second = (made.rows[made.sources == source].tolist() for source in range(2))
        assert first == sorted(first)
        assert first != second, "sources must not be drawn from in the same places"
        parts.append(first)
    assert set().union(*parts) == set(range(40))


def test_the_first_rows_of_a_mix_are_its_beginning() -> None:
    made = mix([5, 9], [0.5, 0.5], stop="all_exhausted", seed=1)
    few = made.first(4)
    assert (few.sources.tolist(), few.rows.tolist()) == (made.sources[:4].tolist(), made.rows[:4].tolist())
    assert made.first(None) is made
    assert len(made.first(10_000)) == len(made)


def test_a_streams_draws_are_the_seeds_and_do_not_come_round() -> None:
    first, again, other = (drawn_forever([0.5, 0.3, 0.2], seed=seed) for seed in (5, 5, 6))
    draws = [next(first) for _ in range(4096)]
    assert [next(again) for _ in range(4096)] == draws
    assert [next(other) for _ in range(4096)] != draws
    for block in (512, 1024, 2048):
        assert draws[:block] != draws[block : 2 * block]


def test_a_rare_source_comes_in_the_middle_and_not_all_sources_at_once() -> None:
    assert mix([9, 1], [0.9, 0.1], stop="all_exhausted", seed=1).sources.tolist() == [0] * 5 + [1] + [0] * 4
    made = mix([90, 10, 10, 10], [0.75, 1 / 12, 1 / 12, 1 / 12], stop="all_exhausted", seed=1)
    for end in range(1, len(made)):
        rare = sum(made.sources[:end].tolist().count(source) for source in (1, 2, 3))
        assert abs(rare - end / 4) <= 1.5
