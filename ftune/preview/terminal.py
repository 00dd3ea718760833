"""Rows and their audit on a terminal: what is learned in colour, or in brackets where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftune.preview.packing import PackedSequence
from ftune.preview.shown import ShownRow, ShownText, ShownToken

_LEARNED, _SPECIAL, _BORDER, _PROBLEM, _HEAD, _QUIET = "bold underline green", "cyan", "dim", "yellow", "bold", "dim"
_SEVERITY = {"fatal": "bold red", "warning": "yellow", "note": "cyan"}
_PART = "<part>"
"""Stands for a token that is only a part of a letter."""


@dataclass(frozen=True)
class _Signs:
    """What stands for things that cannot be seen."""

    border: str
    blank: str
    line: str
    tab: str


_FINE = _Signs("\u00a6", "\u00b7", "\u21b5", "\u2192")
_PLAIN = _Signs("|", "_", "\\n", "\\t")


class Printer:
    """Prints to one stream; every letter of a row that a terminal would obey is written as an escape."""

    def __init__(self, stream: TextIO) -> None:
        self.coloured = stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        kind = {} if self.coloured else {"color_system": None, "force_terminal": False}
        self.console = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True, **kind)  # type: ignore[arg-type]
        try:
            "".join(vars(_FINE).values()).encode(stream.encoding or "ascii")
            self.signs = _FINE
        except UnicodeEncodeError:
            self.signs = _PLAIN

    def legend(self) -> None:
        learned = Text("what is learned", _LEARNED) if self.coloured else Text("[[what is learned]]")
        signs = self.signs
        line = Text.assemble(learned, f"; {signs.border} between tokens; learned: {signs.blank} is a blank, ")
        self.console.print(line.append(f"{signs.line} a line break"), end="\n\n")

    def say(self, line: str) -> None:
        self.console.print(Text(visible(line)), end="\n\n")

    def row(self, row: ShownRow, *, positions: bool) -> None:
        """Print a row: where it stands, how many tokens count, what is odd, and every token."""
        self._heading(row)
        for text in row.texts:
            if text.view:
                self.console.print(Text(f"{text.view}: {_counted(text)}", _QUIET))
            self._text(text, positions=positions)
            if text.cut_tokens:
                self.console.print(Text(f"... {text.cut_tokens:,} more tokens were cut off", _PROBLEM))
        self.console.print()

    def sequence(self, number: int, packed: PackedSequence, *, positions: bool) -> None:
        """Print a packed sequence, a border before each of its rows."""
        said = f"sequence {number}: {len(packed.rows)} rows, {packed.tokens:,} of {packed.places:,} places"
        self.console.print(Text(said, _HEAD))
        for row in packed.rows:
            self.console.print(Text(f"---- {visible(row.place)} ({len(row.texts[0].tokens):,} tokens)", _QUIET))
            for text in row.texts:
                self._text(text, positions=positions)
        self.console.print(Text("----", _QUIET), end="\n\n")

    def _text(self, text: ShownText, *, positions: bool) -> None:
        if positions:
            self.console.print(self._table(text))
            return
        made = self.tokens(text)
        self.console.print(made, end="" if made.plain.endswith("\n") else "\n")

    def tokens(self, text: ShownText) -> Text:
        """Return a text with a sign between every two tokens, and what is learned marked."""
        made = Text()
        before: ShownToken | None = None
        for token in text.tokens:
            opens = token.learned and not (before and before.learned)
            closes = bool(before and before.learned) and not token.learned
            if closes and not self.coloured:
                made.append("]]")
            if before is not None:
                made.append(self.signs.border, _BORDER)
            if opens and not self.coloured:
                made.append("[[")
            made.append(self.token(token), _LEARNED if token.learned else _SPECIAL if token.special else "")
            before = token
        if before and before.learned and not self.coloured:
            made.append("]]")
        return made

    def token(self, token: ShownToken, *, one_line: bool = False) -> str:
        """Return a token's text; where it is learned, its blanks and line breaks can be seen."""
        if not token.text:
            return _PART
        signs, text = self.signs, visible(token.text)
        if token.learned or one_line:
            text = text.replace(" ", signs.blank).replace("\t", signs.tab)
            text = text.replace("\n", signs.line if one_line else signs.line + "\n")
        return text

    def _heading(self, row: ShownRow) -> None:
        counts = f"  {_counted(row.texts[0])}" if len(row.texts) == 1 else ""
        line = Text.assemble((visible(row.place), _HEAD), counts)
        if row.problems:
            line.append("  " + ", ".join(row.problems), _PROBLEM)
        self.console.print(line)

    def _table(self, text: ShownText) -> Table:
        table = Table(box=box.ASCII2 if self.signs is _PLAIN else box.SIMPLE_HEAD)
        for name, side in (("position", "right"), ("id", "right"), ("token", "left"), ("learned", "left")):
            table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
        for position, token in enumerate(text.tokens):
            style = _LEARNED if token.learned else _SPECIAL if token.special else ""
            shown = Text(self.token(token, one_line=True), style)
            table.add_row(str(position), str(token.id), shown, "yes" if token.learned else "")
        return table

    def audit(self, audit: dict[str, Any]) -> None:
        """Print the audit of each part, then what is to be said of all."""
        for name in (name for name in ("train", "eval") if name in audit):
            self._part(name, audit[name])
        for note in audit["notes"]:
            self.console.print(Text.assemble(("note", _SEVERITY["note"]), f": {visible(note)}"))

    def _part(self, name: str, part: dict[str, Any]) -> None:
        self.console.print(Text(f"audit of {name}", _HEAD))
        for label, value in facts(part):
            self.console.print(f"  {label:<16}{visible(value)}")
        for line in bars(part["lengths"]):
            self.console.print(Text(line, _QUIET))
        if not part["findings"]:
            self.console.print("  nothing odd was found")
        for one in part["findings"]:
            self._finding(one)
        self.console.print()

    def _finding(self, one: dict[str, Any]) -> None:
        severity = Text.assemble("  ", (one["severity"], _SEVERITY[one["severity"]]), (f" {one['kind']}", _HEAD))
        self.console.print(severity.append(f": {one['says']}"))
        for word in ("why", "fix"):
            self.console.print(f"      {word}: {visible(one[word])}")
        for example in one["examples"]:
            like = f" (as {example['like']})" if example["like"] else ""
            place = visible(f"{example['file']}:{example['number']}{like}")
            self.console.print(Text.assemble(f"      {place}  ", (visible(example["text"]), _QUIET)))


def visible(text: str) -> str:
    """Return text without letters that a terminal would obey; line breaks and tabs stay."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text)


def _counted(text: ShownText) -> str:
    return f"{len(text.tokens):,} tokens, {text.learned:,} learned"


def facts(part: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield what is counted of a part, in words."""
    formats = ", ".join(dict.fromkeys(source["format"] for source in part["sources"]))
    left_out = f", {part['left_out']:,} left out" if part["left_out"] else ""
    yield "rows", f"{part['rows']:,} ({formats}){left_out}"
    cut = f", {part['cut_tokens']:,} cut off" if part["cut_tokens"] else ""
    share = part["supervised_tokens"] / part["tokens"] if part["tokens"] else 0
    yield "tokens", f"{part['tokens']:,}, {part['supervised_tokens']:,} of them learned ({share:.0%}){cut}"
    if lengths := part["lengths"]:
        says = ", ".join(f"{name} {lengths[name]:,}" for name in ("p50", "p95", "p99"))
        yield "tokens of a row", f"{lengths['shortest']:,} to {part['longest']:,}, mean {lengths['mean']:,}; {says}"
    if found := part["padding"]:
        others = ", ".join(f"{name} {found[name]:.1%}" for name in found if name != "now")
        yield "padding", f"{found['now']:.1%} of the places in a batch; {others}"


def bars(lengths: dict[str, Any], most: int = 12, width: int = 40) -> Sequence[str]:
    """Return the histogram of lengths as lines."""
    if not lengths or len(lengths["counts"]) < 2:
        return []
    step = -(-len(lengths["counts"]) // most)
    counts = [sum(lengths["counts"][at : at + step]) for at in range(0, len(lengths["counts"]), step)]
    edges = [*lengths["edges"][:-1:step], lengths["edges"][-1]]
    ends = [min(edge - 1, lengths["longest"]) for edge in edges[1:]]
    names = [f"{start:,}-{end:,}" for start, end in zip(edges, ends, strict=False)]
    wide = max(len(name) for name in names)
    tallest = max(counts)
    shown = zip(names, counts, strict=True)
    return [f"  {name:>{wide}} {'#' * -(-count * width // tallest):<{width}} {count:,}" for name, count in shown]
