"""A part of the data (training or evaluation) on its way from rows to tokens, and the count of what happened to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ftune.data.faults import Faults
from ftune.data.rows import Row, read_rows
from ftune.data.template import Rendered, render_conversation
from ftune.data.tokenize import Encoded, encode
from ftune.errors import DataError, Place, Problem
from ftune.plugin import Conversation, Format, RowError

BATCH = 128
"""Rows tokenised in one call: the tokenizer's fixed cost per call is that of a few rows."""


@dataclass(frozen=True)
class Part:
    """Which rows: those of some sources, or a random share of them."""

    name: str
    sources: tuple[str, ...]
    split: str
    picked: frozenset[int] | None = None
    """Places, counted over all sources, of rows held out for evaluation; None where nothing is held out."""
    held_out: bool = False
    """Whether this part is what was held out or what was left."""
    most: int | None = None
    """At most so many rows, the first ones."""

    def rows(self, faults: Faults) -> Iterator[Row]:
        every = itertools.chain.from_iterable(read_rows(source, self.split, faults) for source in self.sources)
        chosen = (row for at, row in enumerate(every) if self.picked is None or (at in self.picked) == self.held_out)
        return itertools.islice(chosen, self.most)


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens."""

    format: Format
    tokenizer: Any
    answers_only: bool
    max_length: int

    def conversation(self, row: Row, faults: Faults) -> Conversation | None:
        """Return what a row says; a bad one goes to the faults."""
        try:
            return self.format.read(row.values)
        except RowError as error:
            faults.add(self._problem(row, error, why=f"a row of `{self.format.name}` is {self.format.columns}"))
            return None

    def rendered(self, row: Row, faults: Faults) -> Rendered | None:
        conversation = self.conversation(row, faults)
        if conversation is None:
            return None
        try:
            answers_only = self.answers_only and not self.format.trains_whole_text
            rendered = render_conversation(self.tokenizer, conversation, answers_only=answers_only)
            rendered.text.encode("utf-8")
            return rendered
        except UnicodeEncodeError as error:
            what = f"the text holds half a letter: {error.object[error.start : error.end]!a}, a lone surrogate"
            faults.add(self._problem(row, RowError(what, "write the letter whole, or take it out")))
            return None
        except RowError as error:
            faults.add(self._problem(row, error))
            return None

    @staticmethod
    def _problem(row: Row, error: RowError, why: str = "") -> Problem:
        return Problem("unreadable-row", error.what, Place(row.file, row.number), why=why, fix=error.fix)


@dataclass
class Tally:
    """What happened to the rows of one part."""

    rows: int = 0
    """Rows kept; the token counts are theirs."""
    tokens: int = 0
    supervised_tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    dropped_rows: int = 0
    """Rows of which no token counts in the loss."""
    unanswered_rows: int = 0
    """Those among them that hold no answer at all; the answers of the others were cut off."""
    longest: int = 0
    """Tokens of the longest row before it was cut."""
    endless_rows: int = 0
    joined_rows: int = 0

    def take(self, rendered: Rendered, row: Encoded) -> bool:
        """Count a row; return whether there is something to learn from it."""
        length, supervised = len(row.input_ids), row.supervised_tokens
        self.longest = max(self.longest, length + row.cut_tokens)
        if not supervised:
            self.dropped_rows += 1
            self.unanswered_rows += not rendered.spans or not row.cut_tokens
            return False
        self.rows += 1
        self.tokens += length
        self.supervised_tokens += supervised
        self.cut_rows += row.cut_tokens > 0
        self.cut_tokens += row.cut_tokens
        self.endless_rows += not row.stops
        self.joined_rows += row.joined
        return True

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def encoded_rows(part: Part, encoding: Encoding, tally: Tally) -> Iterator[list[Encoded]]:
    """Yield batches of the part's tokenised rows in their order; DataError for bad rows, several at once."""
    faults = Faults()
    rows = part.rows(faults)
    while taken := list(itertools.islice(rows, BATCH)):
        drafts = [draft for row in taken if (draft := encoding.rendered(row, faults)) is not None]
        if len(faults):
            # The run is lost already: only look for more bad rows.
            continue
        if encoding.format.trains_whole_text:
            drafts, made = _in_pieces(drafts, encode(encoding.tokenizer, drafts, max_length=None), encoding.max_length)
        else:
            made = encode(encoding.tokenizer, drafts, max_length=encoding.max_length)
        kept = [row for draft, row in zip(drafts, made, strict=True) if tally.take(draft, row)]
        if kept:
            yield kept
    faults.stop()
    if not tally.rows:
        raise DataError(_nothing_to_learn(part, encoding, tally))


def _in_pieces(drafts: list[Rendered], rows: list[Encoded], max_length: int) -> tuple[list[Rendered], list[Encoded]]:
    """Return plain texts in pieces of at most `max_length`: nothing of a long one is thrown away."""
    pieces = [(draft, piece) for draft, row in zip(drafts, rows, strict=True) for piece in row.pieces(max_length)]
    return [draft for draft, _ in pieces], [piece for _, piece in pieces]


def _nothing_to_learn(part: Part, encoding: Encoding, tally: Tally) -> Problem:
    cut = tally.dropped_rows - tally.unanswered_rows
    if cut:
        why = f"in {cut} rows the answer begins beyond data.max_length = {encoding.max_length}"
        fix = f"raise data.max_length: the longest row has {tally.longest} tokens"
    else:
        why = "no row holds an answer that is learned: assistant turns are missing, empty, or marked as not trained"
        fix = "look at the roles in the file, or set data.assistant_only_loss: false"
    what = f"nothing to learn from: none of the {tally.dropped_rows} rows has a token that counts in the loss"
    return Problem("nothing-to-learn", what, Place(part.sources[0]), why=why, fix=fix)
