"""What `import ftune` offers to Python programs: the commands, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.errors import Problem, RecipeError

if TYPE_CHECKING:
    from ftune.memory.plan import MemoryPlan
    from ftune.training.result import RunResult

RecipeLike = str | Path | Mapping[str, Any]


def check(recipe: RecipeLike, overrides: Sequence[str] = ()) -> list[Problem]:
    """Return every problem of a recipe on this machine; without an error among them, it can be trained."""
    from ftune.machine import probe
    from ftune.resolve import examine

    try:
        return examine(recipe, overrides, probe())[1]
    except RecipeError as error:
        return list(error.problems)


def plan(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    gpu: str | None = None,
    gpus: int = 1,
    timeout_seconds: float | None = None,
) -> MemoryPlan:
    """Return what a run needs of a GPU, by name or size, else of this machine; raises ftune.errors.FtuneError.

    Of several `gpus` that share the run it is what each needs. Steps of the run are traced in a process of its own,
    which takes seconds for each; more than `timeout_seconds` (600) raise RunError.
    """
    from ftune.memory.ask import ask

    return ask(recipe, overrides, gpu=gpu, timeout_seconds=timeout_seconds, ranks=gpus).plan


def train(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    plain: bool = True,
    plan: bool | None = None,
    force: bool = False,
) -> RunResult:
    """Train from a recipe file, or a mapping of the same shape; raises ftune.errors.FtuneError.

    `plan` says whether the memory of the largest batch is predicted first (None: on a GPU), and `force` to train even
    where it does not fit.
    """
    from ftune.cli.train import start

    return start(recipe, overrides, plain=plain, plan=plan, force=force)  # type: ignore[no-any-return]
