"""Problems as a terminal shows them."""

from __future__ import annotations

import io
import json

import pytest

from ftune.cli.console import print_decisions, print_problems, problem_as_json, render, shorten
from ftune.errors import Place, Problem
from ftune.resolve import Decision


def shown(problem: Problem) -> str:
    return render(problem, io.StringIO())


def test_two_places() -> None:
    first = Place("recipe.yaml", 6, 10, "  optim: sgd", 3)
    second = Place("recipe.yaml", 12, 3, "  fp16: true", 4)
    problem = Problem("a-rule", "these disagree", second, "this", why="because", fix="do that", also=((first, "that"),))
    assert shown(problem) == (
        "error[a-rule]: these disagree\n"
        "  --> recipe.yaml:12:3\n"
        "   |\n"
        " 6 |   optim: sgd\n"
        "   |          --- that\n"
        "12 |   fp16: true\n"
        "   |   ^^^^ this\n"
        "   |\n"
        "   = why: because\n"
        "   = fix: do that"
    )


@pytest.mark.parametrize(
    ("line", "column", "length", "carets"),
    [
        ("a: b", 4, 1, "    ^"),
        ("\ta: b", 5, 1, "     ^"),
        ("\u4e2d\u6587: b", 5, 1, "       ^"),
        ("a: \u4e2d\u6587", 4, 2, "    ^^^^"),
        ("", 1, 1, ""),
        ("a", 1, 50, " ^"),
    ],
)
def test_caret_stands_under_what_it_means(line: str, column: int, length: int, carets: str) -> None:
    lines = shown(Problem("r", "what", Place("f", 1, column, line, length))).splitlines()
    assert (lines[4].removeprefix("  |") if line else "") == carets


def test_a_long_line_is_cut_around_the_caret() -> None:
    line = "x" * 500 + "HERE" + "y" * 500
    text = shown(Problem("r", "what", Place("f", 1, 501, line, 4)))
    excerpt, carets = text.splitlines()[3:5]
    assert len(excerpt) < 170
    assert excerpt[carets.index("^") :].startswith("HERE")
    assert carets.count("^") == 4


def test_control_characters_do_not_reach_the_terminal() -> None:
    text = shown(Problem("r", "a\x1b[31m", Place("f", 1, 1, "b\x1b[0m", 1), "c\x07", why="d\x1b", fix="e\x1b"))
    assert not {"\x1b", "\x07"} & set(text)


def test_count_and_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    print_problems([Problem("r", "one"), Problem("r", "two"), Problem("r", "three", severity="note")], stream=stream)
    assert stream.getvalue().endswith("2 errors, 1 note\n")
    assert "\033[1;31m" in stream.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    print_problems([Problem("r", "one")], stream=stream)
    assert "\033" not in stream.getvalue()


def test_decisions_are_aligned() -> None:
    stream = io.StringIO()
    print_decisions(
        [Decision("a.b", True, "x"), Decision("a.long", 1e-5, "y"), Decision("c.d", None, "z")], stream=stream
    )
    assert stream.getvalue() == "  a.b    = true   x\n  a.long = 1e-05  y\n  c.d    = null   z\n"
    print_decisions([], stream=stream)
    assert shorten("a" * 30 + "b" * 30) == "..." + "a" * 7 + "b" * 30


def test_json_form() -> None:
    place = Place("f", 2, 3, "text")
    answer = problem_as_json(Problem("r", "what", place, "label", why="why", fix="fix"))
    assert json.loads(json.dumps(answer)) == {
        "rule": "r",
        "severity": "error",
        "file": "f",
        "line": 2,
        "column": 3,
        "message": "what; label; why",
        "fix": "fix",
    }
    assert problem_as_json(Problem("r", "what"))["file"] is None
