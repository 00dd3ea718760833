"""ftune: fine-tune language models from one YAML recipe, on the GPU you have.

`import ftune` costs milliseconds: everything heavy is imported by the functions that need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftune.errors import Problem
    from ftune.training.run import RunResult

__version__ = "0.1.0"
__all__ = ["__version__", "check", "train"]

RecipeLike = str | Path | Mapping[str, Any]


def check(recipe: RecipeLike, overrides: Sequence[str] = ()) -> list[Problem]:
    """Return every problem of a recipe on this machine; an empty list means that it can be trained."""
    from ftune.errors import RecipeError
    from ftune.machine import probe
    from ftune.recipe import load
    from ftune.resolve import findings

    try:
        return findings(load(recipe, overrides), probe())
    except RecipeError as error:
        return list(error.problems)


def train(recipe: RecipeLike, overrides: Sequence[str] = (), *, plain: bool = True) -> RunResult:
    """Train from a recipe file, or a mapping of the same shape; raises ftune.errors.FtuneError."""
    from ftune.cli.train import start

    return start(recipe, overrides, plain=plain)
