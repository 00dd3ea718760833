"""Tokens on the disk: what was written is what is read, by rows in any order, and by another process."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

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


IDS = st.lists(st.integers(0, 2**17), max_size=6)


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=25), st.integers(1, 6), st.integers(1, 12))
def test_what_is_asked_of_a_file_is_what_a_loop_over_its_rows_finds(
    texts: list[tuple[list[int], list[int]]], most_rows: int, most_tokens: int
) -> None:
    rows = [Kept(200 + at, 2**33 + at, tuple(map(_learned, each))) for at, each in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokens, "_BATCH", most_rows)
        patched.setattr(tokens, "_BATCH_TOKENS", most_tokens)
        file = tokens.write(None, "key", ("chosen", "rejected"), numpy.int32, iter(rows))
    for at, (one, other) in enumerate(texts):
        assert file.row(at, "chosen").input_ids.tolist() == one
        assert file.row(at, "rejected").input_ids.tolist() == file.row(at, "rejected").labels.tolist() == other
        assert file.place(at) == (200 + at, 2**33 + at)
    assert file.lengths().tolist() == [max(len(one), len(other)) for one, other in texts]
    assert file.largest_id() == max([0, *(number for each in texts for ids in each for number in ids)])
    few = numpy.arange(0, len(texts), 2)
    for asked in (numpy.arange(len(texts)), few, few[:0]):
        for place in range(7):
            expected = [texts[at][0][place] if place < len(texts[at][0]) else -1 for at in asked]
            assert file.tokens_at(asked, place).tolist() == expected


def _learned(ids: list[int]) -> TokenRow:
    """Return a text of which every token is learned."""
    array = numpy.array(ids, dtype=numpy.int64)
    return TokenRow(array, spans_of(array))


def test_long_rows_are_written_in_batches_of_so_many_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_BATCH_TOKENS", 100)
    ids = numpy.arange(30)
    views = ("chosen", "rejected")
    text = TokenRow(ids, spans_of(ids))
    tokens.write(tmp_path, "key", views, numpy.uint16, (Kept(0, at, (text, text)) for at in range(11)))
    reader = pyarrow.ipc.open_file(str(tokens.path_of(tmp_path, "key")))
    sizes = [reader.get_batch(at).num_rows for at in range(reader.num_record_batches)]
    # 60 tokens a row: the second fills a batch.
    assert sizes == [2] * 5 + [1]


def test_no_rows_at_all(tmp_path: Path) -> None:
    for directory in (tmp_path, None):
        file = tokens.write(directory, "key", ("",), numpy.uint16, iter(()))
        assert (len(file), file.lengths().tolist(), file.largest_id()) == (0, [], -1)
        assert file.tokens_at(numpy.zeros(0, dtype=numpy.int64), 0).tolist() == []


@pytest.mark.parametrize(("largest", "kind"), [(2**16 - 1, numpy.uint16), (2**16, numpy.int32)])
def test_ids_take_two_bytes_as_long_as_the_largest_fits(largest: int, kind: type) -> None:
    """A vocabulary may have gaps: what counts is its largest id, which an added token may have."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": largest}, unk_token="a"))
    assert tokens.id_type(PreTrainedTokenizerFast(tokenizer_object=backend)) == kind
    row = TokenRow(numpy.array([largest, 0]), numpy.array([[0, 2]]))
    file = tokens.write(None, "key", ("",), kind, [Kept(0, 1, (row,))])
    assert file.row(0).input_ids.tolist() == file.row(0).labels.tolist() == [largest, 0]
    assert file.largest_id() == largest


def test_an_added_token_counts_too() -> None:
    vocabulary = {str(number): number for number in range(2**16)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")))
    assert tokens.id_type(tokenizer) == numpy.uint16
    tokenizer.add_tokens(["<more>"])
    assert tokenizer.convert_tokens_to_ids("<more>") == 2**16
    assert tokens.id_type(tokenizer) == numpy.int32


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_writers_of_the_same_rows_do_not_meet(tmp_path: Path) -> None:
    """Several processes may write the same file at once, each of them whole."""

    def rows() -> Iterator[Kept]:
        taken = _rows(3)
        yield taken[0]
        if (child := os.fork()) == 0:
            try:
                tokens.write(tmp_path, "key", ("",), numpy.uint16, iter(taken))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        yield from taken[1:]

    file = tokens.write(tmp_path, "key", ("",), numpy.uint16, rows())
    assert [file.row(at).input_ids.tolist() for at in range(3)] == [row.texts[0].input_ids.tolist() for row in _rows(3)]
    assert [path.name for path in tmp_path.iterdir()] == ["key.arrow"]
