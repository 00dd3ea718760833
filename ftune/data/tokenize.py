"""Conversations to token ids and labels; only what should be learned keeps its label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from ftune.data.template import Rendered
from ftune.errors import DataError, Problem
from ftune.losses import IGNORED


@dataclass(frozen=True)
class Encoded:
    """A row as the model sees it."""

    input_ids: numpy.ndarray
    labels: numpy.ndarray
    cut_tokens: int = 0
    """How many tokens were lost at the end."""
    stops: bool = True
    """A mark such as the end of turn is learned; without one the model would never learn to end."""
    joined: bool = False
    """A token spans the border between prompt and answer, which generation will not reproduce."""

    @property
    def supervised_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())

    def pieces(self, length: int) -> Iterator[Encoded]:
        """Yield the row in consecutive pieces; the first token of each has nothing before it to be predicted from."""
        for start in range(0, len(self.input_ids), length):
            labels = self.labels[start : start + length].copy()
            labels[:1] = IGNORED
            last = start + length >= len(self.input_ids)
            yield replace(
                self, input_ids=self.input_ids[start : start + length], labels=labels, stops=self.stops and last
            )


def encode(tokenizer: Any, rows: Sequence[Rendered], *, max_length: int | None) -> list[Encoded]:
    """Return the rows as ids and labels, cut to `max_length` where one is given.

    Each text is tokenised once and whole, so that the ids are those of inference; spans become labels by character
    offsets. The template wrote its own begin mark, so the tokenizer adds none.
    """
    if not rows:
        return []
    require_fast(tokenizer)
    texts = [row.text for row in rows]
    made = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    marks = _marks(tokenizer)
    return [
        _encoded(row, marks, numpy.asarray(ids, dtype=numpy.int32), offsets, max_length)
        for row, ids, offsets in zip(rows, made["input_ids"], made["offset_mapping"], strict=True)
    ]


def require_fast(tokenizer: Any) -> None:
    """Raise DataError for a tokenizer that does not tell where its tokens stand."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            Problem(
                "slow-tokenizer",
                f"{type(tokenizer).__name__} does not tell where in the text its tokens stand",
                why="without that, what the assistant said cannot be told from what it was asked",
                fix="use a model whose repository has a tokenizer.json",
            )
        )


@dataclass(frozen=True)
class _Marks:
    begin: tuple[int, ...]
    """What the tokenizer usually puts before a text."""
    end: int | None
    special: frozenset[int]


def _marks(tokenizer: Any) -> _Marks:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    usual = tokenizer("a")["input_ids"]
    begin: tuple[int, ...] = ()
    for at in range(len(usual) - len(bare) + 1):
        if usual[at : at + len(bare)] == bare:
            begin = tuple(usual[:at])
            break
    special = frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)
    return _Marks(begin, tokenizer.eos_token_id, special)


def _encoded(row: Rendered, marks: _Marks, ids: Any, offsets: Any, max_length: int | None) -> Encoded:
    places = numpy.asarray(offsets, dtype=numpy.int64).reshape(-1, 2)
    learned = numpy.zeros(len(ids), dtype=bool)
    joined = False
    for start, end in row.spans:
        # By overlap, not by where a token starts: a tokenizer may report a blank's empty span at its end, and a token
        # that holds the first letter of the answer must not be lost to the prompt.
        inside = (places[:, 1] > start) & (places[:, 0] < end)
        learned |= inside
        joined = joined or bool(((places[:, 0] < start) & (places[:, 1] > start)).any())
    if not row.templated:
        ids, learned = _with_marks(ids, learned, marks)
    labels = numpy.where(learned, ids, IGNORED).astype(numpy.int32)
    # The first token has nothing before it to be predicted from; so labels that count are predictions made.
    labels[:1] = IGNORED
    return Encoded(
        ids[:max_length],
        labels[:max_length],
        cut_tokens=max(0, len(ids) - max_length) if max_length else 0,
        stops=not marks.special.isdisjoint(labels.tolist()),
        joined=joined,
    )


def _with_marks(ids: Any, learned: Any, marks: _Marks) -> tuple[Any, Any]:
    """Put the begin mark before a plain text and the end mark after it, unless the text has them."""
    begin = [] if tuple(ids[: len(marks.begin)]) == marks.begin else list(marks.begin)
    end = [] if marks.end is None or (len(ids) and ids[-1] == marks.end) else [marks.end]
    everything = numpy.concatenate([begin, ids, end]).astype(numpy.int32)
    mask = numpy.concatenate([[False] * len(begin), learned, [bool(learned.any())] * len(end)]).astype(bool)
    return everything, mask
