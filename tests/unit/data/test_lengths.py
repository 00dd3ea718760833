"""How long rows are, compared with counting; how much is padding, compared with the batches themselves."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared_rows import ROWS, prepared

from ftune.data.batches import batches_of, padding_share, random_batches
from ftune.data.lengths import length_summary, padding, padding_of
from ftune.data.pack import packed
from ftune.data.prepare import prepare
from ftune.recipe.schema import Data, Training


@given(st.lists(st.integers(0, 300), min_size=1, max_size=80))
def test_the_summary_is_what_counting_finds(lengths: list[int]) -> None:
    about = length_summary(numpy.array(lengths, dtype=numpy.int32))
    ordered, edges = sorted(lengths), about["edges"]
    assert (about["shortest"], about["longest"]) == (ordered[0], ordered[-1])
    assert about["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.051)
    for share in (50, 95, 99):
        # The least length that so many rows do not exceed.
        assert about[f"p{share}"] == ordered[math.ceil(share * len(lengths) / 100) - 1]
    assert edges[0] == ordered[0] <= ordered[-1] < edges[-1]
    assert 1 <= len(about["counts"]) == len(edges) - 1 <= 24
    bins = list(itertools.pairwise(edges))
    assert about["counts"] == [sum(start <= each < end for each in lengths) for start, end in bins]


def test_no_rows_have_no_lengths() -> None:
    nothing = numpy.zeros(0, dtype=numpy.int32)
    assert length_summary(nothing) == {}
    assert padding(nothing, Data(train="a"), Training(output_dir="o"), packs=True) == {}


LENGTHS = numpy.random.default_rng(0).integers(5, 100, 600).astype(numpy.int32)


@pytest.mark.parametrize(
    ("chosen", "data", "training", "packs"),
    [
        ("random", {}, {}, True),
        ("group_by_length", {}, {"group_by_length": True}, True),
        ("max_tokens_per_batch", {}, {"max_tokens_per_batch": 130}, True),
        ("max_tokens_per_batch", {}, {"max_tokens_per_batch": 130, "group_by_length": True}, True),
        ("packing", {"packing": True}, {}, True),
        ("random", {"packing": True}, {}, False),
    ],
)
def test_what_is_told_of_now_is_what_the_recipe_does(
    chosen: str, data: dict[str, Any], training: dict[str, Any], packs: bool
) -> None:
    wanted = Training(output_dir="o", per_device_train_batch_size=4, seed=3, **training)
    found = padding(LENGTHS, Data(train="a", max_length=150, **data), wanted, packs=packs)
    assert found.pop("now") == found[chosen]
    budget = training.get("max_tokens_per_batch", 4 * int(LENGTHS.max()))
    expected = {
        "random": random_batches(600, 4, 3),
        "group_by_length": batches_of(LENGTHS, rows=4, most_tokens=None, ranks=1, seed=3),
        "max_tokens_per_batch": batches_of(LENGTHS, rows=4, most_tokens=budget, ranks=1, seed=3),
    }
    for name, batches in expected.items():
        assert found[name] == pytest.approx(padding_share(LENGTHS, batches), abs=1e-4)
    assert ("packing" in found) == packs
    if packs:
        groups = packed(LENGTHS, 150)
        whole = numpy.array([LENGTHS[group].sum() for group in groups])
        expected_share = padding_share(whole, random_batches(len(whole), 4, 3))
        assert found["packing"] == pytest.approx(expected_share, abs=1e-4)


def test_of_very_many_rows_a_sample_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftune.data.lengths._MOST", 1000)
    # Its first rows are all alike, and would tell of no padding at all.
    lengths = numpy.concatenate([numpy.full(1500, 50), numpy.random.default_rng(1).integers(1, 200, 3500)])
    recipe = Data(train="a", max_length=250), Training(output_dir="o", per_device_train_batch_size=4)
    whole = padding_share(lengths, random_batches(5000, 4, 0))
    assert padding(lengths, *recipe, packs=True)["random"] == pytest.approx(whole, abs=0.03)


def test_padding_is_told_of_all_sources_and_of_packing_only_where_rows_pack(
    tokenizer: Any, write_rows: Any, tmp_path: Path
) -> None:
    sources = [write_rows(ROWS[:20], "a.jsonl"), write_rows(ROWS[20:], "b.jsonl")]
    training = Training(output_dir="o", per_device_train_batch_size=4)
    data = Data(train=sources, max_length=128)
    made = prepared(tokenizer, train=sources, max_length=128)
    assert padding_of(made.stored["train"], data, training) == padding(made.train.lengths, data, training, packs=True)
    pairs = Data(train=write_rows([{"prompt": "the cat", "chosen": " sat", "rejected": " ran off"}] * 9, "c.jsonl"))
    learns = frozenset({"preference"})
    two = prepare(pairs, tokenizer=tokenizer, seed=1, cache=tmp_path / "cache", learns=learns)
    assert "packing" not in padding_of(two.stored["train"], pairs, training)
