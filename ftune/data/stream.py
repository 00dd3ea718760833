"""Rows read while training: endless, shuffled by a buffer, mixed by chance, and the same from the same seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy

from ftune.data.faults import Faults
from ftune.data.mixing import drawn_forever, weights_of
from ftune.data.pack import packed
from ftune.data.parts import Encoding, Part
from ftune.data.rows import Row
from ftune.data.sequences import joined
from ftune.data.tokens import TokenRow, spans_of
from ftune.data.workers import BATCH
from ftune.recipe.schema import Data

_PACK = 1024
"""Rows gathered for packing while streaming: the more, the fuller the sequences and the longer the wait."""

Streamed = tuple[float | None, Part, Encoding]
"""A source's weight, its rows, and how they become tokens."""


def stream(sources: Sequence[Streamed], data: Data, seed: int) -> datasets.IterableDataset:
    """Return the rows as an endless stream; the first of each source must have been looked at."""
    weights = weights_of([weight for weight, _, _ in sources], [1] * len(sources), None)
    # No lists among them: `datasets` takes those for shards, and deals out their items.
    shares = None if weights is None else tuple(weights)
    settings = {"sources": tuple(sources), "weights": shares, "packing": data.packing, "seed": seed}
    columns = ("input_ids", "labels", *(("position_ids",) if data.packing else ()))
    features: dict[str, Any] = {column: datasets.Sequence(datasets.Value("int64")) for column in columns}
    one = datasets.Value("int64")
    features["source"] = datasets.Sequence(one) if data.packing else one
    rows = datasets.IterableDataset.from_generator(_stream, features=datasets.Features(features), gen_kwargs=settings)
    return rows.shuffle(seed=seed, buffer_size=data.shuffle_buffer_size)


def _stream(
    sources: tuple[Streamed, ...], weights: tuple[float, ...] | None, packing: bool, seed: int
) -> Iterator[dict[str, Any]]:
    rows = _mixed(sources, weights, seed)
    if not packing:
        for text, source in rows:
            yield {"input_ids": text.input_ids, "labels": text.labels, "source": source}
        return
    while taken := list(itertools.islice(rows, _PACK)):
        yield from _in_sequences(taken, sources[0][2].max_length)


def _mixed(
    sources: tuple[Streamed, ...], weights: tuple[float, ...] | None, seed: int
) -> Iterator[tuple[TokenRow, int]]:
    # Pass after pass in one stream: a resumed run then skips what was seen, whichever pass it was in.
    if weights is None:
        while True:
            for number, (_, part, encoding) in enumerate(sources):
                yield from ((row, number) for row in _rows_of(part, encoding))
    endless = [_again_and_again(part, encoding) for _, part, encoding in sources]
    for number in drawn_forever(weights, seed):
        yield next(endless[number]), number


def _again_and_again(part: Part, encoding: Encoding) -> Iterator[TokenRow]:
    while True:
        yield from _rows_of(part, encoding)


def _rows_of(part: Part, encoding: Encoding) -> Iterator[TokenRow]:
    """Yield one pass over a source's rows that teach something; DataError for bad rows."""
    faults = Faults()
    rows: Iterator[Row] = part.rows(faults)
    while taken := list(itertools.islice(rows, BATCH)):
        done = encoding.worked(taken, faults)
        faults.stop()
        for worked in done:
            if worked.encoded[0].supervised_tokens:
                yield TokenRow(worked.encoded[0].input_ids.astype(numpy.int64), spans_of(worked.encoded[0].labels))
    faults.stop()


def _in_sequences(rows: list[tuple[TokenRow, int]], capacity: int) -> Iterator[dict[str, Any]]:
    groups = packed(numpy.array([len(text.input_ids) for text, _ in rows]), capacity)
    for at in range(len(groups)):
        members = groups[at]
        yield joined([rows[row][0] for row in members], [rows[row][1] for row in members])
