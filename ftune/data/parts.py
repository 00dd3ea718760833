"""One source's share of a part (training or evaluation) on its way from rows to tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ftune.data.faults import Faults
from ftune.data.rows import Row, read_rows
from ftune.data.template import Rendered, render_conversation
from ftune.data.tokenize import Encoded, encode
from ftune.errors import Place, Problem
from ftune.plugin import Conversation, Format, RowError


@dataclass(frozen=True)
class Part:
    """Which rows of one source: all, or a random share of them."""

    name: str
    """`train` or `eval`."""
    source: str
    split: str
    picked: frozenset[int] | None = None
    """Places of rows held out for evaluation; None where nothing is held out."""
    held_out: bool = False
    """Whether this part is what was held out or what was left."""
    most: int | None = None
    """At most so many rows, the first ones."""

    def rows(self, faults: Faults) -> Iterator[Row]:
        every = read_rows(self.source, self.split, faults)
        chosen = (row for at, row in enumerate(every) if self.picked is None or (at in self.picked) == self.held_out)
        return itertools.islice(chosen, self.most)


@dataclass(frozen=True)
class Worked:
    """A row with all that became of it: one conversation, text and list of tokens for each view."""

    row: Row
    views: tuple[Conversation, ...]
    rendered: tuple[Rendered, ...]
    encoded: tuple[Encoded, ...]
    ends: bool = True
    """Whether the row's end is in it; false for the earlier pieces of a long plain text."""


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens."""

    format: Format
    tokenizer: Any
    answers_only: bool
    max_length: int
    train_on_turns: Literal["all", "last"] = "all"

    def conversations(self, row: Row, faults: Faults) -> tuple[Conversation, ...] | None:
        """Return what a row says; a bad one goes to the faults."""
        try:
            return self.format.read_views(row.values)
        except RowError as error:
            faults.add(self._problem(row, error, why=f"a row of `{self.format.name}` is {self.format.columns}"))
            return None

    def worked(self, rows: Sequence[Row], faults: Faults) -> list[Worked]:
        """Return the rows as text and tokens; bad ones go to the faults. A long plain text becomes several."""
        drafts = [draft for row in rows if (draft := self._draft(row, faults)) is not None]
        whole_text = self.format.trains_whole_text
        flat = [text for draft in drafts for text in draft.rendered]
        made = iter(encode(self.tokenizer, flat, max_length=None if whole_text else self.max_length))
        done = [replace(draft, encoded=tuple(itertools.islice(made, len(draft.rendered)))) for draft in drafts]
        return [piece for each in done for piece in self._pieces(each)] if whole_text else done

    def _pieces(self, worked: Worked) -> Iterator[Worked]:
        """Yield a plain text in pieces of at most `max_length`: nothing of a long one is thrown away."""
        pieces = list(worked.encoded[0].pieces(self.max_length))
        return (replace(worked, encoded=(piece,), ends=piece is pieces[-1]) for piece in pieces)

    def _draft(self, row: Row, faults: Faults) -> Worked | None:
        views = self.conversations(row, faults)
        if views is None:
            return None
        try:
            rendered = tuple(self._render(view) for view in views)
        except UnicodeEncodeError as error:
            what = f"the text holds half a letter: {error.object[error.start : error.end]!a}, a lone surrogate"
            faults.add(self._problem(row, RowError(what, "write the letter whole, or take it out")))
            return None
        except RowError as error:
            faults.add(self._problem(row, error))
            return None
        return Worked(row, views, rendered, ())

    def _render(self, view: Conversation) -> Rendered:
        answers_only = self.answers_only and not self.format.trains_whole_text
        rendered = render_conversation(
            self.tokenizer, view, answers_only=answers_only, train_on_turns=self.train_on_turns
        )
        rendered.text.encode("utf-8")
        return rendered

    @staticmethod
    def _problem(row: Row, error: RowError, why: str = "") -> Problem:
        return Problem("unreadable-row", error.what, Place(row.file, row.number), why=why, fix=error.fix)
