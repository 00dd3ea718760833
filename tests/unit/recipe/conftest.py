"""A recipe written for one test, and what ftune says of it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ftune.cli.console import render
from ftune.errors import Problem, RecipeError
from ftune.recipe import Loaded, load

SMALLEST = "model: {model_name_or_path: my-model}\ndata: {train: train.jsonl}\ntraining:\n  output_dir: runs/x\n"
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_recipe(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


@pytest.fixture
def loaded(write: Write) -> Callable[..., Loaded]:
    """Return a function that loads the smallest recipe with further lines below `training`."""
    return lambda more="", overrides=(): load(write(SMALLEST + more), overrides)


@pytest.fixture
def refused(write: Write) -> Callable[..., list[Problem]]:
    """Return a function that gives the problems of a text."""

    def problems(text: str, overrides: Sequence[str] = ()) -> list[Problem]:
        with pytest.raises(RecipeError) as caught:
            load(write(text), overrides)
        for problem in caught.value.problems:
            assert render(problem, io.StringIO())
        return list(caught.value.problems)

    return problems
