"""Tokenised rows on the disk: an Arrow file read in place, so that a million rows cost no memory of their own.

Learned tokens are kept as spans, not as labels, and ids in 16 bits where the vocabulary allows: little more than a
quarter of the bytes that 32-bit ids and labels would take.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow

from ftune import rundir
from ftune.losses import IGNORED

_BATCH = 4096
"""Rows of one record batch; reading a row finds its batch by bisection."""
_BATCH_TOKENS = 2**24
"""A batch of very long rows ends earlier: it is in memory while it is written, and its offsets have 32 bits."""


@dataclass(frozen=True)
class TokenRow:
    """One text of one row as tokens."""

    input_ids: numpy.ndarray
    spans: numpy.ndarray
    """(n, 2): where learned tokens begin and end."""

    @property
    def labels(self) -> numpy.ndarray:
        """The ids where they are learned, IGNORED elsewhere; int64."""
        labels = numpy.full(len(self.input_ids), IGNORED, dtype=numpy.int64)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels


def spans_of(labels: numpy.ndarray) -> numpy.ndarray:
    """Return where runs of learned tokens begin and end, (n, 2)."""
    learned = numpy.concatenate([[False], labels != IGNORED, [False]])
    return numpy.flatnonzero(learned[1:] != learned[:-1]).reshape(-1, 2).astype(numpy.int32)


@dataclass(frozen=True)
class Kept:
    """What is stored of one row: where it stands and its texts as tokens, one for each view."""

    file: int
    """Which of the source's files."""
    number: int
    texts: tuple[TokenRow, ...]


class TokenFile:
    """Rows of one source, memory-mapped; picklable, so that loader workers can open it again."""

    def __init__(self, path: Path | None, views: Sequence[str], buffer: pyarrow.Buffer | None = None) -> None:
        self.path, self.views, self._buffer = path, tuple(views), buffer
        opened = pyarrow.memory_map(str(path)) if buffer is None else pyarrow.BufferReader(buffer)
        reader = pyarrow.ipc.open_file(opened)
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts = numpy.cumsum([0] + [batch.num_rows for batch in batches])
        self._columns = [{name: _list_column(batch, name) for name in _list_names(self.views)} for batch in batches]
        self._places = [
            (batch.column("file").to_numpy(), batch.column("number").to_numpy(zero_copy_only=False))
            for batch in batches
        ]

    def __reduce__(self) -> Any:
        return TokenFile, (self.path, self.views, self._buffer)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, at: int, view: str = "") -> TokenRow:
        """Return a row's text; its arrays look into the file and must not be written to."""
        batch = int(numpy.searchsorted(self._starts, at, side="right")) - 1
        inside, columns = at - int(self._starts[batch]), self._columns[batch]
        found = []
        for name in (column(view, "input_ids"), column(view, "spans")):
            offsets, values = columns[name]
            found.append(values[offsets[inside] : offsets[inside + 1]])
        return TokenRow(found[0], found[1].reshape(-1, 2))

    def tokens_at(self, rows: numpy.ndarray, place: int) -> numpy.ndarray:
        """Return the token at one place of each row's first text, -1 behind its end; the rows are sorted."""
        found = numpy.full(len(rows), -1, dtype=numpy.int64)
        borders = numpy.searchsorted(rows, self._starts)
        for batch, columns in enumerate(self._columns):
            start, end = borders[batch], borders[batch + 1]
            offsets, values = columns[column(self.views[0], "input_ids")]
            inside = rows[start:end] - self._starts[batch]
            at = offsets[inside].astype(numpy.int64) + place
            there = at < offsets[inside + 1]
            found[start:end][there] = values[at[there]]
        return found

    def place(self, at: int) -> tuple[int, int]:
        """Return which file a row comes from, and its number there."""
        batch = int(numpy.searchsorted(self._starts, at, side="right")) - 1
        files, numbers = self._places[batch]
        inside = at - int(self._starts[batch])
        return int(files[inside]), int(numbers[inside])

    def lengths(self) -> numpy.ndarray:
        """Return the tokens of each row, of its longest text where it has several; int32."""
        if not self._columns:
            return numpy.zeros(0, dtype=numpy.int32)
        names = [column(view, "input_ids") for view in self.views]
        longest = [numpy.max([numpy.diff(columns[name][0]) for name in names], axis=0) for columns in self._columns]
        return numpy.concatenate(longest).astype(numpy.int32)

    def learned(self) -> numpy.ndarray:
        """Return the learned tokens of each row's first text; int32."""
        found = [numpy.zeros(0, dtype=numpy.int32)]
        for columns in self._columns:
            offsets, values = columns[column(self.views[0], "spans")]
            spans = values.reshape(-1, 2)
            before = numpy.concatenate([[0], numpy.cumsum(spans[:, 1] - spans[:, 0])])
            found.append(numpy.diff(before[offsets // 2]).astype(numpy.int32))
        return numpy.concatenate(found)

    def largest_id(self) -> int:
        """Return the largest token id in any row, -1 where there are no tokens."""
        names = [column(view, "input_ids") for view in self.views]
        return max((int(columns[name][1].max(initial=0)) for columns in self._columns for name in names), default=-1)


def column(view: str, name: str) -> str:
    """Return what a column of a view is called: `chosen_input_ids`; of an unnamed view just `input_ids`."""
    return f"{view}_{name}" if view else name


def _list_names(views: Iterable[str]) -> list[str]:
    return [column(view, name) for view in views for name in ("input_ids", "spans")]


def _list_column(batch: pyarrow.RecordBatch, name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    lists = batch.column(name)
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def id_type(tokenizer: Any) -> numpy.dtype[Any]:
    """Return the smallest type that holds every id a tokenizer can write."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    return numpy.dtype(numpy.uint16 if largest < 2**16 else numpy.int32)


def write(directory: Path | None, key: str, views: Sequence[str], ids: Any, rows: Iterable[Kept]) -> TokenFile:
    """Write rows to a file that is there whole or not at all; to memory without a directory."""
    schema = _schema(views, ids)
    if directory is None:
        sink = pyarrow.BufferOutputStream()
        _fill(sink, schema, views, ids, rows)
        return TokenFile(None, views, sink.getvalue())
    directory.mkdir(parents=True, exist_ok=True)
    final, partial = path_of(directory, key), directory / f"{key}.{os.getpid()}{rundir.PARTIAL_SUFFIX}"
    try:
        with pyarrow.OSFile(str(partial), "wb") as sink:
            _fill(sink, schema, views, ids, rows)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    return TokenFile(final, views)


def find(directory: Path, key: str, views: Sequence[str]) -> tuple[TokenFile, dict[str, Any]] | None:
    """Return stored rows with their notes, if they are there whole."""
    try:
        notes = json.loads((directory / f"{key}.json").read_text(encoding="utf-8"))
        return TokenFile(path_of(directory, key), views), notes
    except (OSError, ValueError, KeyError, pyarrow.ArrowInvalid):
        return None


def write_notes(directory: Path | None, key: str, notes: dict[str, Any]) -> None:
    """Write what is known about stored rows; being last, it says that they are complete."""
    if directory is not None:
        rundir.write_text(directory / f"{key}.json", json.dumps(notes, indent=1))


def path_of(directory: Path, key: str) -> Path:
    return directory / f"{key}.arrow"


def _schema(views: Sequence[str], ids: Any) -> pyarrow.Schema:
    kinds = {"input_ids": pyarrow.list_(pyarrow.from_numpy_dtype(ids)), "spans": pyarrow.list_(pyarrow.int32())}
    lists = [(name, kinds["spans" if name.endswith("spans") else "input_ids"]) for name in _list_names(views)]
    return pyarrow.schema([*lists, ("file", pyarrow.int32()), ("number", pyarrow.int64())])


def _fill(sink: Any, schema: pyarrow.Schema, views: Sequence[str], ids: Any, rows: Iterable[Kept]) -> None:
    with pyarrow.ipc.new_file(sink, schema) as writer:
        for taken in _chunks(rows):
            columns: list[pyarrow.Array] = []
            for index in range(len(views)):
                columns.append(_list_array([row.texts[index].input_ids for row in taken], ids))
                columns.append(_list_array([row.texts[index].spans.ravel() for row in taken], numpy.int32))
            columns.append(pyarrow.array([row.file for row in taken], pyarrow.int32()))
            columns.append(pyarrow.array([row.number for row in taken], pyarrow.int64()))
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def _chunks(rows: Iterable[Kept]) -> Iterator[list[Kept]]:
    taken: list[Kept] = []
    held = 0
    for row in rows:
        taken.append(row)
        held += sum(len(text.input_ids) for text in row.texts)
        if len(taken) == _BATCH or held >= _BATCH_TOKENS:
            yield taken
            taken, held = [], 0
    if taken:
        yield taken


def _list_array(arrays: list[numpy.ndarray], kind: Any) -> pyarrow.ListArray:
    offsets = numpy.zeros(len(arrays) + 1, dtype=numpy.int32)
    numpy.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = numpy.concatenate(arrays).astype(kind) if arrays else numpy.zeros(0, dtype=kind)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))
