"""The error tree: exit codes, and problems as text."""

from __future__ import annotations

import pickle

import pytest

from ftune import errors
from ftune.errors import Place, Problem


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.RecipeError, 2),
        (errors.MachineError, 3),
        (errors.DataError, 4),
        (errors.RunError, 5),
        (errors.Interrupted, 130),
    ],
)
def test_exit_codes(kind: type[errors.FtuneError], code: int) -> None:
    assert kind().exit_code == code
    assert isinstance(kind(), errors.FtuneError)


def test_problem_as_text() -> None:
    problem = Problem("r", "what", Place("f.yaml", 3, 4), why="why", fix="fix")
    assert str(problem) == "f.yaml:3:4: what; why; fix"
    assert str(Problem("r", "what")) == "what"
    assert str(errors.RunError(problem, Problem("r", "other"))) == "f.yaml:3:4: what; why; fix\nother"


def test_place_without_a_line_is_its_file_alone() -> None:
    assert str(Place("--set #2", None, 5)) == "--set #2"


def test_an_error_survives_the_way_out_of_a_worker() -> None:
    """PyTorch rebuilds what a data loader's worker raised, from its text."""
    error = errors.DataError(Problem("r", "what", fix="fix"))
    assert type(error)(str(error)).problems[0].what == "what; fix"
    assert pickle.loads(pickle.dumps(error)).problems
