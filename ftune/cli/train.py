"""`ftune train`: train in this process, or as the rank it was started as."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ftune.machine import Machine
    from ftune.training.foretold import Foresee


def train(
    recipe: Annotated[str, typer.Argument(help="The recipe file.", metavar="RECIPE")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.", metavar="S.K=V")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of a progress bar.")] = False,
    plan: Annotated[
        bool | None, typer.Option(help="Predict the memory of the largest batch first.", show_default="on a GPU")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train even where the plan does not fit.")] = False,
) -> None:
    """Train from a recipe, and leave everything in its output_dir.

    Example: ftune train recipe.yaml --set training.num_train_epochs=1
    """
    start(recipe, override or (), plain=plain, plan=plan, force=force)


def start(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    *,
    plain: bool,
    plan: bool | None = None,
    force: bool = False,
) -> Any:
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
    return run.train(spec, plain=plain, foresee=foresight(machine, plan), force=force)


def foresight(machine: "Machine", plan: bool | None) -> "Foresee | None":
    """Return what foretells a run's memory; None where nobody asks for it, and there is no GPU that would fill up."""
    import functools

    if not (machine.device_type == "cuda" if plan is None else plan):
        return None
    from ftune.memory.foreseen import foresee

    return functools.partial(foresee, machine=machine)
