"""What is odd about rows: found while they become tokens, counted, and told once with examples.

Most bad fine-tunes are bad data that nobody looked at. A fatal finding stops the run; the others are told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ftune.data.answers import is_learned
from ftune.data.parts import Encoding, Worked
from ftune.data.tokenize import Encoded
from ftune.errors import Place
from ftune.plugin import Finding

MOST_EXAMPLES = 3
"""Rows shown of each kind."""

_ALL_OR_NOTHING = {"never-stops": "whole", "begins-twice": "rows"}
"""Findings that stop the run where they hold for every row that can show them: not rows are wrong then, but the
template or the tokenizer."""

_REPLACED = re.compile("[\\ufffd\\x00-\\x08\\x0e-\\x1a\\x1c-\\x1f\\x7f]")
"""What a decoder writes for what it cannot read, and letters that no text has; page breaks and colours some have."""


@dataclass(frozen=True)
class Example:
    """A row in which something was found."""

    file: str
    number: int
    text: str
    like: str = ""
    """The place of the row that it is a copy of."""

    @property
    def place(self) -> Place:
        return Place(self.file, self.number)

    def __str__(self) -> str:
        return f"{self.place} (as {self.like})" if self.like else str(self.place)


@dataclass(frozen=True)
class Found:
    """A finding, in how many rows, and a few of them."""

    finding: Finding
    rows: int
    of: int
    examples: tuple[Example, ...]
    severity: str
    more: str = ""
    """What the numbers are of this one: tokens lost."""

    @property
    def says(self) -> str:
        return f"{self.rows:,} of {self.of:,} rows {self.finding.what}" + (f": {self.more}" if self.more else "")

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able data, for `preview --json`."""
        finding = self.finding
        said = {"kind": finding.kind, "severity": self.severity, "rows": self.rows, "of": self.of, "says": self.says}
        return {**said, "why": finding.why, "fix": finding.fix, "examples": [asdict(each) for each in self.examples]}


@dataclass
class Audit:
    """What was counted in one source's rows; partial ones of several processes add up."""

    rows: int = 0
    """Rows kept; the token counts are theirs."""
    left_out: int = 0
    """Rows of which no token is learned."""
    whole: int = 0
    """Rows kept whose end is in them: neither cut nor an earlier piece of a long text."""
    tokens: int = 0
    supervised_tokens: int = 0
    cut_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row before it was cut."""
    counts: Counter[str] = field(default_factory=Counter)
    """Rows by kind of finding."""
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def take(self, worked: Worked, kinds: Iterable[str]) -> bool:
        """Count a row with what was found in it; return whether there is something to learn from it."""
        kinds = list(kinds)
        for kind in kinds:
            self.note(kind, example_of(worked))
        self.longest = max(self.longest, *(len(each.input_ids) + each.cut_tokens for each in worked.encoded))
        if "no-answer" in kinds or "answer-cut-off" in kinds:
            self.left_out += 1
            return False
        self.rows += 1
        self.whole += worked.ends and not any(each.cut_tokens for each in worked.encoded)
        self.tokens += sum(len(each.input_ids) for each in worked.encoded)
        self.supervised_tokens += sum(each.supervised_tokens for each in worked.encoded)
        self.cut_tokens += sum(each.cut_tokens for each in worked.encoded)
        return True

    def note(self, kind: str, example: Example) -> None:
        self.counts[kind] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < MOST_EXAMPLES:
            shown.append(example)

    def add(self, other: Audit) -> None:
        """Count what another process found in later rows."""
        for name in ("rows", "left_out", "whole", "tokens", "supervised_tokens", "cut_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.counts.update(other.counts)
        for kind, examples in other.examples.items():
            shown = self.examples.setdefault(kind, [])
            shown += examples[: MOST_EXAMPLES - len(shown)]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able data that `from_dict` reads back."""
        examples = {kind: [asdict(example) for example in shown] for kind, shown in self.examples.items()}
        return {**vars(self), "counts": dict(self.counts), "examples": examples}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Audit:
        examples = {kind: [Example(**example) for example in shown] for kind, shown in data["examples"].items()}
        return Audit(**{**data, "counts": Counter(data["counts"]), "examples": examples})

    def found(self, findings: Iterable[Finding], *, ignored: Iterable[str] = ()) -> Iterator[Found]:
        """Yield what was found, in the order of the list of findings."""
        every = self.rows + self.left_out
        for finding in findings:
            count = self.counts[finding.kind]
            if not count or finding.kind in ignored:
                continue
            everywhere = finding.kind in _ALL_OR_NOTHING and count >= getattr(self, _ALL_OR_NOTHING[finding.kind])
            more = ""
            if finding.kind == "cut":
                share = self.cut_tokens / (self.tokens + self.cut_tokens)
                more = f"{self.cut_tokens:,} tokens ({share:.1%}) are lost; the longest has {self.longest:,}"
            yield Found(
                finding,
                count,
                every,
                tuple(self.examples.get(finding.kind, ())),
                "fatal" if everywhere else finding.severity,
                more,
            )


def example_of(worked: Worked) -> Example:
    """Return the row with what is asked in it; a system prompt is often that of every other row."""
    asked = [turn.content for turn in worked.views[0].turns if turn.role not in ("system", "developer")]
    text = next(filter(str.strip, asked), worked.rendered[0].text)
    return Example(worked.row.file, worked.row.number, shortened(text))


def shortened(text: str) -> str:
    """Return a text in one line of at most 100 letters."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."


class RowChecks:
    """Finds what is odd about single rows; made once for an encoding."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        tokenizer = encoding.tokenizer
        self.begin, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        if self.pad in (tokenizer.eos_token_id, None) or self._is_mark(tokenizer, self.pad):
            self.pad = None  # it ends turns too: padding is masked by place, so that it is learned where it stands
        marks = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.marks = re.compile("|".join(map(re.escape, filter(str.strip, marks))) or r"(?!)")
        # A tokenizer without an end mark can still learn from plain text, as it was pretrained.
        self.ends = tokenizer.eos_token_id is not None or not encoding.format.trains_whole_text

    @staticmethod
    def _is_mark(tokenizer: Any, number: int) -> bool:
        return str(tokenizer.convert_ids_to_tokens(number)) in str(getattr(tokenizer, "chat_template", None) or "")

    def kinds(self, worked: Worked) -> list[str]:
        """Return the kinds of finding that hold for a row."""
        found = [self._nothing_learned(worked)] if self._learns_nothing(worked) else []
        if not found:
            found += [kind for kind, holds in self._token_checks(worked) if holds]
        found += [kind for kind, holds in self._text_checks(worked) if holds]
        found += self.encoding.format.remarks(worked.views)
        return found

    def _learns_nothing(self, worked: Worked) -> bool:
        """Return whether nothing is learned from a row that should teach something."""
        return not any(each.supervised_tokens for each in worked.encoded) and self.encoding.format.teaches

    def _nothing_learned(self, worked: Worked) -> str:
        cut = any(text.spans and each.cut_tokens for text, each in zip(worked.rendered, worked.encoded, strict=True))
        return "answer-cut-off" if cut else "no-answer"

    def _token_checks(self, worked: Worked) -> Iterator[tuple[str, bool]]:
        encoded = worked.encoded
        learned = [each for each in encoded if each.supervised_tokens]
        yield "cut", any(each.cut_tokens for each in encoded)
        ending = [each for each in learned if worked.ends and not each.cut_tokens]
        yield "never-stops", self.ends and any(not each.stops for each in ending)
        yield "begins-twice", any(self._begins_twice(each) for each in encoded)
        yield "pad-learned", self.pad is not None and any((each.labels == self.pad).any() for each in learned)
        yield "unprompted", any(text.unprompted for text in worked.rendered)
        yield "joined", any(each.joined for each in encoded)
        yield "rewritten", any(text.rewritten for text in worked.rendered)

    def _begins_twice(self, each: Encoded) -> bool:
        first = each.input_ids[:2]
        return self.begin is not None and len(first) == 2 and bool((first == self.begin).all())

    def _text_checks(self, worked: Worked) -> Iterator[tuple[str, bool]]:
        turns = [turn for view in worked.views for turn in view.turns]
        answers = [replace(turn, trained=True) for turn in turns if turn.role == "assistant"]
        yield "empty-answer", not all(is_learned(answer) for answer in answers)
        texts = [turn.content for turn in turns] or [text.text for text in worked.rendered]
        yield "broken-text", any(_is_broken(text) for text in texts)
        # Plain text brings its own marks: nobody else would write them.
        yield "mark-in-text", any(self.marks.search(turn.content) for turn in turns)


def _is_broken(text: str) -> bool:
    """Return whether a text holds letters that stand for bytes of others."""
    if _REPLACED.search(text):
        return True
    if text.isascii():
        return False
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    return is_bad(text) and fix_encoding(text) != text
