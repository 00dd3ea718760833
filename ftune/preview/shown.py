"""Rows as lists of tokens that can be printed: the text of each, and whether it is learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from ftune.data.parts import Encoding, Worked
from ftune.data.tokens import TokenRow
from ftune.losses import IGNORED

_MOST_PARTS = 8
"""A letter is four bytes at most, and each of them at most one token; more than this is no letter."""


@dataclass(frozen=True)
class ShownToken:
    """One token; its text is empty where it is only a part of a letter, which stands at the last of its tokens."""

    id: int
    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class ShownText:
    """One text of a row: the row itself, or one of two answers."""

    view: str
    tokens: tuple[ShownToken, ...]
    cut_tokens: int = 0

    @property
    def learned(self) -> int:
        return sum(token.learned for token in self.tokens)


@dataclass(frozen=True)
class ShownRow:
    """A row, where it stands, and the kinds of finding that hold for it."""

    file: str
    number: int
    text: str
    """All of it, what was cut off too."""
    texts: tuple[ShownText, ...]
    problems: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"

    def having(self, kind: str) -> ShownRow:
        """Return the row with one more kind of finding."""
        return self if kind in self.problems else replace(self, problems=(*self.problems, kind))

    def as_line(self) -> dict[str, Any]:
        """Return a line of `preview --json`."""
        first = self.texts[0]
        line = {"row": self.number, "file": self.file, "text": self.text, **_columns(first)}
        line["problems"] = list(self.problems)
        if len(self.texts) > 1:
            line["views"] = {text.view: _columns(text) for text in self.texts}
        return line


def _columns(text: ShownText) -> dict[str, Any]:
    tokens = text.tokens
    learned = [int(token.learned) for token in tokens]
    return {"tokens": [token.text for token in tokens], "supervised": learned, "truncated": text.cut_tokens > 0}


def shown_row(tokenizer: Any, worked: Worked, encoding: Encoding, problems: Sequence[str]) -> ShownRow:
    texts = tuple(
        ShownText(view, shown_tokens(tokenizer, each.input_ids, each.labels != IGNORED), each.cut_tokens)
        for view, each in zip(encoding.format.views, worked.encoded, strict=True)
    )
    # A long plain text is divided: this is one piece of it.
    divided = encoding.format.trains_whole_text
    text = "".join(token.text for token in texts[0].tokens) if divided else worked.rendered[0].text
    return ShownRow(worked.row.file, worked.row.number, text, texts, tuple(problems))


def stored_text(tokenizer: Any, row: TokenRow, view: str = "") -> ShownText:
    return ShownText(view, shown_tokens(tokenizer, row.input_ids, row.labels != IGNORED))


def shown_tokens(tokenizer: Any, ids: numpy.ndarray, learned: numpy.ndarray) -> tuple[ShownToken, ...]:
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    numbers = [int(number) for number in ids]
    texts = token_texts(tokenizer, numbers)
    made = zip(numbers, texts, learned.tolist(), strict=True)
    return tuple(ShownToken(number, text, counts, number in special) for number, text, counts in made)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text; a letter of several tokens stands at the last of them."""
    return list(_texts(tokenizer, ids))


def _texts(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before: list[int] = []
    waiting: list[int] = []
    for place, number in enumerate(ids):
        waiting.append(number)
        # With what stands before it: some tokenizers take the blank off whatever text they begin.
        known, text = (tokenizer.decode(part, **settings) for part in (before, before + waiting))
        added = text[len(known) :] if text.startswith(known) else tokenizer.decode(waiting, **settings)
        if added.endswith("\ufffd") and len(waiting) < _MOST_PARTS and place + 1 < len(ids):
            yield ""
            continue
        yield added
        before, waiting = waiting, []
