"""Data that are not there are found before anything heavy is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ftune.errors import DataError, MachineError, Problem, RecipeError, RunError
from ftune.machine import Machine
from ftune.places import expanded, locate
from ftune.recipe import load
from ftune.resolve import examine, files, raise_errors, resolve

Examine = Callable[..., list[Problem]]


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Return a function that examines a recipe lying in `recipes/`, seen from `here/`."""
    (tmp_path / "here").mkdir()
    (tmp_path / "recipes" / "data").mkdir(parents=True)
    (tmp_path / "recipes" / "data" / "train.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "recipes" / "data" / "empty.jsonl").touch()
    (tmp_path / "recipes" / "data" / "nothing").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def problems(data: str, more: str = "", model: str = "my-model") -> list[Problem]:
        recipe = tmp_path / "recipes" / "recipe.yaml"
        text = f"model: {{model_name_or_path: {model}}}\ndata: {{{data}}}\ntraining:\n  output_dir: o\n{more}"
        recipe.write_text(text, encoding="utf-8")
        return examine(recipe, (), Machine())[1]

    return problems


@pytest.mark.parametrize("name", ["data/train.jsonl", "some/hub-name", "squad", "[data/train.jsonl, some/hub-name]"])
def test_data_that_may_be_there(name: str, found: Examine) -> None:
    assert found(f"train: {name}") == []


@pytest.mark.parametrize(
    ("name", "rule", "says"),
    [
        ("data/trian.jsonl", "data-file", "did you mean data/train.jsonl?"),
        ("elsewhere/x.jsonl", "data-file", "relative paths count from here"),
        ("./folder", "data-file", "there is no file ./folder"),
        ("data/empty.jsonl", "data-empty", "is empty"),
        ("data/nothing", "data-empty", "is an empty directory"),
        ("~nobody-of-this-name/x.jsonl", "data-file", "there is no file"),
        ("x" * 300 + ".jsonl", "data-file", "there is no file"),
        ("[data/train.jsonl, data/empty.jsonl]", "data-empty", "data/empty.jsonl is empty"),
    ],
)
def test_data_that_are_not_there(name: str, rule: str, says: str, found: Examine) -> None:
    (problem,) = found(f"train: {name}")
    assert problem.rule == rule
    assert says in f"{problem.what} {problem.fix}"
    assert problem.where is not None
    assert problem.where.line == 2
    with pytest.raises(DataError):
        raise_errors([problem])


def test_a_folder_closed_to_us_is_a_problem_not_a_crash(found: Examine, tmp_path: Path) -> None:
    closed = tmp_path / "recipes" / "data" / "nothing"
    closed.chmod(0)
    try:
        if os.access(closed, os.R_OK):
            pytest.skip("this user may read everything")
        assert [problem.rule for problem in found("train: data/nothing")] == ["data-file"]
    finally:
        closed.chmod(0o755)


def test_evaluating_on_the_training_rows_is_a_warning(found: Examine) -> None:
    (problem,) = found("train: data/train.jsonl, eval: ../recipes/data/train.jsonl")
    assert (problem.rule, problem.severity) == ("data-overlap", "warning")
    raise_errors([problem])


def test_missing_template(found: Examine) -> None:
    assert [problem.rule for problem in found("train: some/data, chat_template: none.jinja")] == ["data-file"]


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("./my-model", RecipeError),
        ("/no/such/model", RecipeError),
        ("../recipes/recipe.yaml", RecipeError),
        ("package:no_such_package", MachineError),
        ("package:not-a-name", MachineError),
    ],
)
def test_models_that_are_not_there(model: str, error: type[Exception], found: Examine) -> None:
    with pytest.raises(error):
        raise_errors(found("train: some/data", model=model))


def mapping(output_dir: str) -> dict[str, dict[str, str]]:
    """Return the smallest recipe, as Python programs give it."""
    return {
        "model": {"model_name_or_path": "some/model"},
        "data": {"train": "some/data"},
        "training": {"output_dir": output_dir},
    }


@pytest.mark.parametrize("name", ["~nobody-of-this-name/run", "x" * 300])
def test_an_output_directory_that_is_no_path(name: str) -> None:
    (problem,) = examine(mapping(name), (), Machine())[1]
    assert problem.rule == "bad-path"
    with pytest.raises(RecipeError):
        raise_errors([problem])
    with pytest.raises(RecipeError):
        resolve(load(mapping(name)), Machine())


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ([], ""),
        ([".lock"], ""),
        (["run.json", "recipe.yaml", "model.partial"], ""),
        (["mine.txt"], "it holds other files"),
        (["run.json", "metrics.jsonl"], "it holds another run"),
        (["run.json", "model"], "it holds another run"),
        (["run.json", "mine.txt"], "besides a run that failed it holds mine.txt"),
    ],
)
def test_an_output_directory_in_use_is_told_before_training(
    names: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    for name in names:
        (directory / name).touch()
    problems = examine(mapping(str(directory)), (), Machine())[1]
    assert [(problem.rule, problem.why) for problem in problems] == ([("output-dir", why)] if why else [])
    if why:
        assert problems[0].where is not None
        assert problems[0].where.line is not None
        with pytest.raises(RunError):
            raise_errors(problems)
    # The other ranks of a run find what the first one made.
    monkeypatch.setenv("RANK", "1")
    assert examine(mapping(str(directory)), (), Machine())[1] == []


def test_an_output_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    (problem,) = examine(mapping(str(tmp_path / "run")), (), Machine())[1]
    assert problem.why == "it is a file"


def test_problems_of_recipe_and_data_come_together(found: Examine) -> None:
    shape_and_data = found("train: data/trian.jsonl, pakcing: true")
    assert [problem.rule for problem in shape_and_data] == ["data-file", "unknown-key"]
    rule_and_data = found("train: data/trian.jsonl", "  bf16: true\n  fp16: true\n")
    assert {problem.rule for problem in rule_and_data} > {"data-file", "one-precision"}
    for problems in (shape_and_data, rule_and_data):
        with pytest.raises(RecipeError) as caught:
            raise_errors(problems)
        assert len(caught.value.problems) == len([each for each in problems if each.severity == "error"])


def test_machine_comes_before_data(found: Examine) -> None:
    with pytest.raises(MachineError):
        raise_errors(found("train: data/trian.jsonl", "  tf32: true\n"))


def test_where_we_are_comes_before_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "a.jsonl").touch()
    (beside / "b.jsonl").touch()
    monkeypatch.chdir(here)
    assert locate("a.jsonl", beside) == here / "a.jsonl"
    assert locate("b.jsonl", beside) == beside / "b.jsonl"
    assert locate("c.jsonl", beside) is None
    assert locate(str(beside / "a.jsonl"), here) == beside / "a.jsonl"


def test_fingerprint_covers_each_file_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1", encoding="utf-8")
    before = files.fingerprint([str(tmp_path), "some/hub-name"])
    assert list(before) == [str(tmp_path / "a.jsonl")]
    (tmp_path / "a.jsonl").write_text("2", encoding="utf-8")
    assert files.fingerprint([str(tmp_path)]) != before


def test_a_path_that_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/run") == tmp_path / "run"
    assert expanded("no/such/folder") == Path("no/such/folder")
    for name in ("~nobody-of-this-name", "x" * 300, "a\0b", "/".join(["x" * 200] * 30)):
        with pytest.raises(RecipeError) as caught:
            expanded(name)
        (problem,) = caught.value.problems
        assert problem.rule == "bad-path"
        assert problem.why
        assert len(problem.what) < 100
