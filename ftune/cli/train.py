"""`ftune train`: train in this process, or as the rank it was started as."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="The recipe file.", metavar="RECIPE")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.", metavar="S.K=V")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of a progress bar.")] = False,
) -> None:
    """Train from a recipe, and leave everything in its output_dir.

    Example: ftune train recipe.yaml --set training.num_train_epochs=1
    """
    start(recipe, override or (), plain=plain)


def start(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str], *, plain: bool) -> Any:
    """Check, decide, create the run directory, train; returns the RunResult."""
    import os
    import sys

    from ftune.cli import console
    from ftune.machine import probe
    from ftune.resolve import examine, raise_errors, resolve

    machine = probe()
    loaded, problems = examine(recipe, overrides, machine)
    raise_errors(problems)
    assert loaded is not None
    spec = resolve(loaded, machine)
    main_rank = os.environ.get("RANK", "0") == "0"
    if main_rank:
        console.print_problems(problems, stream=sys.stderr)
        console.print_decisions(spec.decisions)
        sys.stdout.flush()

    from ftune.training import directory, run

    if main_rank:
        directory.create(spec)
    return run.train(spec, plain=plain)
