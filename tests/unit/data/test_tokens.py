"""Tokens on the disk: what was written is what is read, by rows in any order, and by another process."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftune.data import tokens
from ftune.data.tokens import Kept, TokenRow, spans_of

LABELS = st.lists(st.sampled_from([-100, 7, 8]), max_size=20)


@given(LABELS)
def test_spans_say_what_labels_say(labels: list[int]) -> None:
    given_labels = numpy.array(labels, dtype=numpy.int64)
    ids = numpy.where(given_labels == -100, 5, given_labels)
    assert TokenRow(ids, spans_of(given_labels)).labels.tolist() == labels


def _rows(count: int) -> list[Kept]:
    drawn = numpy.random.default_rng(0)
    rows = []
    for number in range(count):
        ids = drawn.integers(0, 60_000, drawn.integers(0, 12))
        labels = numpy.where(drawn.random(len(ids)) < 0.5, ids, -100)
        rows.append(Kept(number % 3, number + 1, (TokenRow(ids, spans_of(labels)),)))
    return rows


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("kind", [numpy.uint16, numpy.int32])
def test_rows_come_back(stored: bool, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_BATCH", 7)  # so that rows lie in several batches
    rows = _rows(40)
    file = tokens.write(tmp_path if stored else None, "key", ("",), kind, iter(rows))
    again = pickle.loads(pickle.dumps(file))
    assert len(file) == len(again) == 40
    for at in numpy.random.default_rng(1).permutation(40).tolist():
        for opened in (file, again):
            assert opened.row(at).input_ids.tolist() == rows[at].texts[0].input_ids.tolist()
            assert opened.row(at).labels.tolist() == rows[at].texts[0].labels.tolist()
            assert opened.place(at) == (rows[at].file, rows[at].number)
    assert file.lengths().tolist() == [len(row.texts[0].input_ids) for row in rows]
    assert file.largest_id() == max(int(row.texts[0].input_ids.max(initial=0)) for row in rows)


def test_views_are_kept_apart(tmp_path: Path) -> None:
    one, other = TokenRow(numpy.array([1, 2]), numpy.array([[1, 2]])), TokenRow(numpy.array([3]), numpy.zeros((0, 2)))
    file = tokens.write(tmp_path, "key", ("chosen", "rejected"), numpy.uint16, [Kept(0, 1, (one, other))])
    assert file.row(0, "chosen").labels.tolist() == [-100, 2]
    assert file.row(0, "rejected").input_ids.tolist() == [3]
    assert file.lengths().tolist() == [2], "of the longer one"


def test_nothing_is_found_before_it_is_whole(tmp_path: Path) -> None:
    assert tokens.find(tmp_path, "key", ("",)) is None
    tokens.write(tmp_path, "key", ("",), numpy.uint16, _rows(3))
    assert tokens.find(tmp_path, "key", ("",)) is None, "the notes come last"
    tokens.write_notes(tmp_path, "key", {"rows": 3})
    found = tokens.find(tmp_path, "key", ("",))
    assert found is not None
    assert (len(found[0]), found[1]) == (3, {"rows": 3})
    tokens.path_of(tmp_path, "key").write_bytes(b"nonsense")
    assert tokens.find(tmp_path, "key", ("",)) is None


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> object:
        yield from _rows(2)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        tokens.write(tmp_path, "key", ("",), numpy.uint16, rows())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
