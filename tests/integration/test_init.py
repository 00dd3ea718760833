from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftune import shipped
from ftune.cli.init import copy_recipe
from ftune.errors import RecipeError

RECIPE = """\
# A small one.
# More words.
model:
  model_name_or_path: x
data:
  train: data/rows.jsonl
  eval: [data/more.jsonl, Some/HubName]
training:
  output_dir: runs/x
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder to write into, with recipes of our own as the shipped ones."""
    root = tmp_path / "shipped"
    (root / "data").mkdir(parents=True)
    (root / "small.yaml").write_text(RECIPE, encoding="utf-8")
    (root / "other.yaml").write_text("model: {}\n", encoding="utf-8")
    for name in ("rows.jsonl", "more.jsonl", "unused.jsonl", "X-LICENSE.txt"):
        (root / "data" / name).write_text(name, encoding="utf-8")
    monkeypatch.setattr(shipped, "recipes", lambda: root)
    return tmp_path / "here"


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_recipe_data_and_licence_are_copied(folder: Path) -> None:
    written = copy_recipe("small", folder / "recipe.yaml")
    assert files(folder) == ["data/X-LICENSE.txt", "data/more.jsonl", "data/rows.jsonl", "recipe.yaml"]
    assert sorted(path.relative_to(folder).as_posix() for path in written) == files(folder)
    assert (folder / "recipe.yaml").read_text(encoding="utf-8") == RECIPE
    assert (folder / "data" / "rows.jsonl").read_text() == "rows.jsonl"


def test_files_that_are_there_and_the_same_are_kept(folder: Path) -> None:
    copy_recipe("small", folder / "one.yaml")
    assert copy_recipe("small", folder / "two.yaml") == [folder / "two.yaml"]


def test_nothing_is_written_when_something_is_in_the_way(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "rows.jsonl").write_text("mine")
    with pytest.raises(RecipeError, match=r"rows\.jsonl"):
        copy_recipe("small", folder / "recipe.yaml")
    assert files(folder) == ["data/rows.jsonl"]
    assert (folder / "data" / "rows.jsonl").read_text() == "mine"
    (folder / "recipe.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        copy_recipe("other", folder / "recipe.yaml")
    assert (folder / "recipe.yaml").read_text() == "mine"


def test_unknown_name_gives_the_near_one_and_the_list(folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        copy_recipe("smal", folder / "recipe.yaml")
    assert caught.value.problems[0].fix == "did you mean `small`? there are: other, small"
    with pytest.raises(RecipeError):
        copy_recipe("../shipped/small", folder / "recipe.yaml")
    assert not folder.exists()


@pytest.mark.usefixtures("folder")
def test_summary() -> None:
    assert shipped.summary("small") == "A small one."
    assert shipped.summary("other") == ""


@pytest.mark.skipif(not shipped.recipe_path("quickstart").is_file(), reason="no quickstart here")
def test_the_command(tmp_path: Path, ftune: Callable[..., Any]) -> None:
    answer = ftune("init", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "next: ftune train recipe.yaml"
    assert "recipe.yaml" in files(tmp_path)
    assert f"wrote {'recipe.yaml'}" in answer.stdout
    again = ftune("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    listed = ftune("init", "--list")
    assert any(line.startswith("quickstart ") for line in listed.stdout.splitlines())
    unknown = ftune("init", "quickstrat", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "did you mean `quickstart`?" in unknown.stderr
