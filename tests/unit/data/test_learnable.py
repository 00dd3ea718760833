"""An objective gets rows that it can learn from, or says why not: named in the recipe or found in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftune import plugin
from ftune.data.detect import choose_format
from ftune.data.parts import Part
from ftune.errors import DataError, Problem
from ftune.rules import check
from ftune.rules.check import example

OBJECTIVES = plugin.names(plugin.OBJECTIVES)
ROWS: dict[str, dict[str, Any]] = {
    "preference": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "unpaired_preference": {"prompt": "p", "completion": "c", "label": True},
    "prompt": {"prompt": "p", "answer": "a"},
    "rationale": {"question": "q", "rationale": "r", "answer": "a"},
    "prompt_completion": {"prompt": "p", "completion": "c"},
}
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
EITHER = {"prompt": "q", "messages": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, "score_chosen": 7.0}
"""As ultrafeedback_binarized writes them: to be learned alone, or as a pair."""


def chosen(folder: Path, row: dict[str, Any], learns: set[str] | None, name: str = "auto") -> str:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    formats = None if learns is None else frozenset(learns)
    return choose_format(name, Part("train", str(path), "train"), formats).name


def refusal(folder: Path, row: dict[str, Any], learns: set[str] | None, name: str = "auto") -> Problem:
    with pytest.raises(DataError) as caught:
        chosen(folder, row, learns, name)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", plugin.names(plugin.FORMATS))
def test_a_recipe_is_refused_where_the_objective_cannot_learn_its_rows(name: str, objective: str) -> None:
    refused = name not in plugin.objective(objective).formats
    loaded = example({"objective": {"method": objective}, "data": {"format": name}})
    found = [problem for problem in check(loaded) if problem.rule == "objective-reads-format"]
    assert bool(found) == refused
    assert all(f"{objective} cannot learn from `{name}` rows" in problem.what for problem in found)
    for key in ("train", "eval"):
        source = {"path": "rows.jsonl", "format": name}
        loaded = example({"objective": {"method": objective}, "data": {"train": "text.jsonl", key: [source]}})
        assert any(problem.rule == "objective-reads-every-source" for problem in check(loaded)) == refused


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_found_where_they_can_be_learned(name: str, tmp_path: Path) -> None:
    assert chosen(tmp_path, ROWS[name], {name, "text"}) == name


@pytest.mark.parametrize("named", ["auto", "itself"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_cannot_be_learned_are_refused(name: str, named: str, tmp_path: Path) -> None:
    problem = refusal(tmp_path, ROWS[name], {"text", "alpaca"}, name if named == "itself" else "auto")
    assert problem.rule == "format-not-learned"
    assert str(problem.where).endswith("rows.jsonl:1")
    assert f"the rows are `{name}`" in problem.what
    assert all(f"`{key}`" in problem.what for key in ROWS[name])
    assert "one of alpaca, text" in problem.fix
    able = [method for method in OBJECTIVES if name in plugin.objective(method).formats]
    assert all(method in problem.fix for method in able)
    assert ("objective.method" in problem.fix) == bool(able)


def test_a_row_of_two_kinds_is_read_as_the_objective_needs_it(tmp_path: Path) -> None:
    assert chosen(tmp_path, EITHER, {"messages", "alpaca"}) == "messages"
    assert chosen(tmp_path, EITHER, {"preference"}) == "preference"
    problem = refusal(tmp_path, EITHER, {"messages", "preference"})
    assert "fits several formats: messages, preference" in problem.what


def test_without_an_objective_any_may_learn(tmp_path: Path) -> None:
    learned = set().union(*(plugin.objective(method).formats for method in OBJECTIVES))
    for name, row in ROWS.items():
        if name in learned:
            assert chosen(tmp_path, row, None) == name
        else:
            assert refusal(tmp_path, row, None).rule == "format-not-learned"


def test_only_formats_that_would_help_are_named(tmp_path: Path) -> None:
    problem = refusal(tmp_path, {"a": 1}, {"text"})
    assert "text: " in problem.why
    assert "alpaca" not in problem.why
