"""Conversations to token ids and labels; only what should be learned keeps its label."""

from __future__ import annotations

import contextlib
import itertools
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
    """A token spanned the border of an answer and was divided there, as generation has it; or could not be."""

    @property
    def supervised_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())

    def pieces(self, length: int) -> Iterator[Encoded]:
        """Yield the row in consecutive pieces; the first token of each has nothing before it to be predicted from."""
        count = len(self.input_ids)
        borders = [*range(0, count, length), count]
        if count > length > 2 and count % length == 1:
            borders[-2] -= 1  # a last token alone, with nothing before it, would not be learned
        for start, end in itertools.pairwise(borders):
            labels = self.labels[start:end].copy()
            labels[:1] = IGNORED
            yield replace(self, input_ids=self.input_ids[start:end], labels=labels, stops=self.stops and end == count)


def encode(tokenizer: Any, rows: Sequence[Rendered], *, max_length: int | None) -> list[Encoded]:
    """Return the rows as ids and labels, cut to `max_length` where one is given.

    Each text is tokenised once and whole, so that the ids are those of inference; spans become labels by character
    offsets. A token that would span a border is divided there, as it is when a prompt is tokenised alone. The template
    wrote its own begin mark, so the tokenizer adds none.
    """
    if not rows:
        return []
    require_fast(tokenizer)
    marks = _marks(tokenizer)
    with _untrimmed(tokenizer):
        made = _tokens(tokenizer, [row.text for row in rows], marks)
        return [
            _encoded(row, marks, *_divided(tokenizer, row, tokens, marks), max_length)
            for row, tokens in zip(rows, made, strict=True)
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
    greedy: frozenset[int]
    """Special tokens that swallow the blanks beside them, as Phi-3's do."""
    divider: tuple[str, int] | None
    """A special token that swallows none."""


@dataclass(frozen=True)
class _Tokens:
    ids: numpy.ndarray
    places: numpy.ndarray
    """Where each token begins and ends in the text, (n, 2)."""

    def across(self, border: int) -> bool:
        """Return whether a token begins before a border and ends behind it."""
        return bool(((self.places[:, 0] < border) & (self.places[:, 1] > border)).any())


def _marks(tokenizer: Any) -> _Marks:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    usual = tokenizer("a")["input_ids"]
    begin: tuple[int, ...] = ()
    for at in range(len(usual) - len(bare) + 1):
        if usual[at : at + len(bare)] == bare:
            begin = tuple(usual[:at])
            break
    added = tokenizer.added_tokens_decoder
    greedy = frozenset(number for number, token in added.items() if token.lstrip or token.rstrip)
    plain = ((token.content, number) for number, token in added.items() if token.special and number not in greedy)
    divider = next((mark for mark in plain if mark[0].strip()), None)
    return _Marks(begin, tokenizer.eos_token_id, frozenset(added) | set(tokenizer.all_special_ids), greedy, divider)


@contextlib.contextmanager
def _untrimmed(tokenizer: Any) -> Iterator[None]:
    """Let tokens stand where they are: GPT-2's post-processor tells their places without the blanks they hold."""
    backend = tokenizer.backend_tokenizer
    usual = backend.post_processor
    backend.post_processor = None
    try:
        yield
    finally:
        backend.post_processor = usual


def _tokens(tokenizer: Any, texts: list[str], marks: _Marks) -> list[_Tokens]:
    made = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = []
    for text, ids, offsets in zip(texts, made["input_ids"], made["offset_mapping"], strict=True):
        places = numpy.asarray(offsets, dtype=numpy.int64).reshape(-1, 2)
        for at in [at for at, number in enumerate(ids) if number in marks.greedy] if marks.greedy else ():
            written = text[slice(*places[at])]
            # The blanks go with the mark, and the mark belongs where it stands itself.
            places[at] += (len(written) - len(written.lstrip()), len(written.rstrip()) - len(written))
        tokens.append(_Tokens(numpy.asarray(ids, dtype=numpy.int32), places))
    return tokens


def _divided(tokenizer: Any, row: Rendered, tokens: _Tokens, marks: _Marks) -> tuple[_Tokens, bool]:
    """Return the tokens, none of them across the border of a span, and whether one was."""
    borders = sorted({border for span in row.spans for border in span if tokens.across(border)})
    if not borders or marks.divider is None:
        return tokens, bool(borders)
    mark, number = marks.divider
    text = row.text
    for border in reversed(borders):
        text = text[:border] + mark + text[border:]
    (found,) = _tokens(tokenizer, [text], marks)
    put = numpy.asarray([border + at * len(mark) for at, border in enumerate(borders)])
    kept = ~(numpy.isin(found.places[:, 0], put) & (found.ids == number))
    places = found.places[kept]
    apart = _Tokens(found.ids[kept], places - len(mark) * numpy.searchsorted(put, places))
    # Some tokenizers begin every stretch with a blank, which would change the answer.
    same = tokenizer.decode(apart.ids.tolist()) == tokenizer.decode(tokens.ids.tolist())
    return (apart if same else tokens), True


def _encoded(row: Rendered, marks: _Marks, tokens: _Tokens, joined: bool, max_length: int | None) -> Encoded:
    ids, places = tokens.ids, tokens.places
    learned = numpy.zeros(len(ids), dtype=bool)
    stops = False
    for start, end in row.spans:
        # By overlap, not by where a token starts: a token that holds the first letter of the answer and could not be
        # divided must not be lost to the prompt.
        inside = (places[:, 1] > start) & (places[:, 0] < end)
        learned |= inside
        # The last token alone: thinking and calls are wrapped in special tokens too, and end nothing.
        last = numpy.flatnonzero(inside)[-1:] if row.templated and end <= len(row.text) else numpy.flatnonzero(inside)
        stops = stops or not marks.special.isdisjoint(ids[last[last < (max_length or len(ids))]].tolist())
    if not row.templated:
        ids, learned = _with_marks(ids, learned, marks)
    labels = numpy.where(learned, ids, IGNORED).astype(numpy.int32)
    # The first token has nothing before it to be predicted from; so labels that count are predictions made.
    labels[:1] = IGNORED
    return Encoded(
        ids[:max_length],
        labels[:max_length],
        cut_tokens=max(0, len(ids) - max_length) if max_length else 0,
        stops=stops if row.templated else not marks.special.isdisjoint(labels[:max_length].tolist()),
        joined=joined,
    )


def _with_marks(ids: Any, learned: Any, marks: _Marks) -> tuple[Any, Any]:
    """Put the begin mark before a plain text and the end mark after it, unless the text has them."""
    begin = [] if tuple(ids[: len(marks.begin)]) == marks.begin else list(marks.begin)
    end = [] if marks.end is None or (len(ids) and ids[-1] == marks.end) else [marks.end]
    everything = numpy.concatenate([begin, ids, end]).astype(numpy.int32)
    mask = numpy.concatenate([[False] * len(begin), learned, [bool(learned.any())] * len(end)]).astype(bool)
    return everything, mask
