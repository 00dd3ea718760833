"""YAML 1.2 as people write it, and every way of not writing it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ftune.errors import RecipeError
from ftune.recipe import source


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("012", 12),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("-3", -3),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e5", 1e5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("True", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("'2e-4'", "2e-4"),
        ('"true"', "true"),
        ("[1, two, 3.0]", [1, "two", 3.0]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = source.parse("recipe", f"key: {text}").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(source.parse("recipe", "key: .nan").data["key"])


def test_anchors_and_aliases() -> None:
    data = source.parse("recipe", "one: &shared {a: 1}\ntwo: *shared\n").data
    assert data == {"one": {"a": 1}, "two": {"a": 1}}


@pytest.mark.parametrize(
    ("text", "says", "line", "column"),
    [
        ("a: 1\nb:\n\tc: 2\n", "a tab", 3, 1),
        ("a: [1, 2\n", "not YAML", 2, 1),
        ("a: b: c\n", "not YAML", 1, 5),
        ("- a\n- b\n", "not a list", 1, 1),
        ("just words\n", "not text", 1, 1),
        ("7\n", "not a number", 1, 1),
        ("~\n", "not nothing", 1, 1),
        ("a: 1\na: 2\n", "given twice", 2, 1),
        ("a: 1\n---\nb: 2\n", "second document", 2, 1),
        ("a: !!python/none x\n", "the tag !", 1, 4),
        ("a: !thing x\n", "the tag !", 1, 4),
        ("? [a]\n: b\n", "plain word", 1, 3),
        ("a: \x07\n", "U+0007", 1, 4),
        ("a: *nobody\n", "undefined alias", 1, 4),
        ("a: &again [*again]\n", "nested too deeply", 1, 4),
    ],
)
def test_what_is_not_a_recipe_is_shown_where_it_stands(text: str, says: str, line: int, column: int) -> None:
    with pytest.raises(RecipeError) as caught:
        source.parse("recipe", text)
    problem = caught.value.problems[0]
    assert says in problem.what
    assert problem.where is not None
    assert (problem.where.line, problem.where.column) == (line, column)


def test_duplicate_key_shows_both_places() -> None:
    with pytest.raises(RecipeError) as caught:
        source.parse("recipe", "a: 1\nb: 2\na: 3\n")
    (problem,) = caught.value.problems
    assert problem.also[0][0].line == 1


def test_deep_nesting_is_refused_not_crashed_on() -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        source.parse("recipe", "a: " + "[" * 5000)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}")])
def test_twenty_levels_are_read_and_one_more_is_not(opening: str, closing: str) -> None:
    # The sections' mapping is level 0, and the innermost word is a level of its own.
    data = source.parse("recipe", "a: " + opening * 19 + "x" + closing * 19).data
    for _ in range(20):
        data = data["a"] if isinstance(data, dict) else data[0]
    assert data == "x"
    with pytest.raises(RecipeError, match="nested too deeply") as caught:
        source.parse("recipe", "a: " + opening * 20 + "x" + closing * 20)
    where = caught.value.problems[0].where
    assert where is not None
    assert (where.line, where.column) == (1, 4 + 19 * len(opening) + 1)


def test_twenty_thousand_nodes_are_read_and_more_are_not() -> None:
    # The mapping, a, its words, b, and what b repeats: 3 + 99 + 200 * (1 + 99) nodes at most.
    words = ", ".join(["x"] * 99)
    for repeats, fits in ((198, True), (199, False)):
        text = f"a: &a [{words}]\nb: [{', '.join(['*a'] * repeats)}]\n"
        if fits:
            assert sum(map(len, source.parse("recipe", text).data["b"])) == 198 * 99
        else:
            with pytest.raises(RecipeError, match="repeats itself"):
                source.parse("recipe", text)


def test_a_recipe_of_a_hundred_thousand_words_is_refused_before_it_is_read() -> None:
    with pytest.raises(RecipeError, match="too long for a recipe") as caught:
        source.parse("recipe", "a:\n" + "  - x\n" * 100_000)
    assert caught.value.problems[0].where is not None
    assert caught.value.problems[0].where.line == 19_999, "the document, its key and this list come before"


def test_aliases_of_aliases_do_not_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 9)]
    with pytest.raises(RecipeError, match="repeats itself"):
        source.parse("recipe", "\n".join(lines))


def test_a_number_of_thousands_of_digits() -> None:
    assert source.parse("recipe", "a: " + "9" * 6000).data["a"] == math.inf


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    raw = b"\xef\xbb\xbfmodel:\r\n  dtype: auto\r\n"
    path.write_bytes(raw)
    read = source.read(path)
    assert read.data == {"model": {"dtype": "auto"}}
    assert read.text.encode() == raw, "a run keeps its recipe byte for byte"
    assert read.key(("model",)).text == "model:"
    assert read.key(("model", "dtype")).text == "  dtype: auto"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1\n", encoding="utf-8")
    (tmp_path / "latin.yaml").write_bytes("a: 1\nname: M\u00fcller\n".encode("latin-1"))
    for name, says in (
        ("recpie.yaml", "did you mean"),
        ("missing/other.yaml", "ftune init"),
        (".", "is a directory"),
        ("latin.yaml", "latin.yaml:2: "),
        ("x" * 300, "cannot read"),
        ("nul\0byte", "cannot read"),
    ):
        with pytest.raises(RecipeError) as caught:
            source.read(tmp_path / name)
        assert says in str(caught.value)


def test_empty_value_is_marked_at_its_key() -> None:
    read = source.parse("recipe", "a:\n  b:\n  c: 1\n")
    assert read.value(("a", "b")).column == 3
    assert read.value(("a", "c")).column == 6
