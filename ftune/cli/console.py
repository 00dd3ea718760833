"""Printing: problems like a good compiler's, decisions as a table; colour only on a terminal."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from ftune.errors import Place, Problem
    from ftune.resolve import Decision

_COLOURS = {"error": "1;31", "warning": "1;33", "note": "1;36", "bold": "1", "frame": "1;34", "dim": "2"}


_SELF_EVIDENT = ("unknown-key", "unknown-method", "missing-key", "bad-value", "duplicate-key", "override", "yaml")
"""Problems whose name would say nothing beyond their text."""


def paint(text: str, colour: str, stream: TextIO) -> str:
    """Return text in a colour where the stream is a terminal that wants it."""
    if not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{_COLOURS[colour]}m{text}\033[0m"


def print_problems(problems: Iterable[Problem], *, stream: TextIO | None = None) -> None:
    """Print each problem with its place, a caret and the fix, then how many there are."""
    stream = stream or sys.stderr
    problems = list(problems)
    for problem in problems:
        print(render(problem, stream), file=stream, end="\n\n")
    counts = [(kind, sum(problem.severity == kind for problem in problems)) for kind in ("error", "warning", "note")]
    said = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts if count)
    if len(problems) > 1:
        print(said, file=stream)


def render(problem: Problem, stream: TextIO) -> str:
    """Return one problem as text."""
    shown_rule = f"[{problem.rule}]" if problem.why and problem.where and problem.rule not in _SELF_EVIDENT else ""
    lines = [
        paint(problem.severity + shown_rule, problem.severity, stream)
        + paint(f": {_plain(problem.what)}", "bold", stream)
    ]
    places = sorted(
        [(place, label, "-") for place, label in problem.also]
        + ([(problem.where, problem.label, "^")] if problem.where else []),
        key=lambda item: item[0].line or 0,
    )
    margin = max([len(str(place.line or "")) for place, _, _ in places], default=1) or 1
    if problem.where is not None:
        lines.append(" " * margin + paint("--> ", "frame", stream) + str(problem.where))
    shown = [item for item in places if item[0].text]
    if shown:
        lines.append(" " * margin + paint(" |", "frame", stream))
        for place, label, mark in shown:
            lines.extend(_excerpt(place, label, mark, margin, problem.severity, stream))
        lines.append(" " * margin + paint(" |", "frame", stream))
    lead = " " * margin + (paint(" = ", "frame", stream) if problem.where else "  ")
    lines.extend(
        lead + f"{word}: {_plain(text)}" for word, text in (("why", problem.why), ("fix", problem.fix)) if text
    )
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Return text without control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text)


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for each wide letter."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _excerpt(place: Place, label: str, mark: str, margin: int, severity: str, stream: TextIO) -> list[str]:
    number = str(place.line or "").rjust(margin)
    column = place.column or 1
    text, start = place.text, column - 1
    if len(text) > 160:  # one screen: a long JSON row is cut around the caret
        begin = max(0, start - 60)
        text, start = ("..." if begin else "") + text[begin : begin + 150] + "...", start - begin + (3 if begin else 0)
    text = text.replace("\t", " ")
    caret = mark * max(1, _columns(text[start : start + place.length]))
    colour = severity if mark == "^" else "frame"
    label = _plain(label)
    text, lead = _plain(text), " " * _columns(text[:start])
    return [
        f"{paint(number + ' |', 'frame', stream)} {text}",
        f"{' ' * margin}{paint(' |', 'frame', stream)} {lead}{paint(f'{caret} {label}'.rstrip(), colour, stream)}",
    ]


def print_decisions(decisions: Sequence[Decision], *, stream: TextIO | None = None) -> None:
    """Print what ftune chose, and why, as aligned columns."""
    stream = stream or sys.stdout
    if not decisions:
        return
    names = [decision.key for decision in decisions]
    values = [shorten(decision.value) for decision in decisions]
    width, value_width = max(map(len, names)), max(map(len, values))
    for decision, name, value in zip(decisions, names, values, strict=True):
        print(f"  {name:<{width}} = {value:<{value_width}}  {paint(decision.why, 'dim', stream)}", file=stream)


def shorten(value: Any, limit: int = 40) -> str:
    """Return a value as a recipe writes it, its middle left out where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= limit else "..." + text[3 - limit :]


def problem_as_json(problem: Problem) -> dict[str, Any]:
    """Return a problem in the form of `check --json`."""
    where = problem.where
    return {
        "rule": problem.rule,
        "severity": problem.severity,
        "file": where.file if where else None,
        "line": where.line if where else None,
        "column": where.column if where else None,
        "message": "; ".join(text for text in (problem.what, problem.label, problem.why) if text),
        "fix": problem.fix,
    }
