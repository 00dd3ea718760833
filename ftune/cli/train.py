"""`ftune train`: train in this process, or as the rank it was started as."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ftune.machine import Machine
    from ftune.resolve import RunSpec


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
    return run.train(spec, plain=plain, force=force, **foresight(spec, machine, plan))


def foresight(spec: "RunSpec", machine: "Machine", plan: bool | None) -> dict[str, Any]:
    """Return what foretells a run's memory, and what chooses the rows that it leaves open; each where it is wanted.

    Unasked, only a GPU is planned for, which would fill up.
    """
    foretells = machine.device_type == "cuda" if plan is None else plan
    chooses = spec.recipe.training.per_device_train_batch_size == "auto"
    if not foretells and not chooses:
        return {}
    from ftune.memory.foreseen import Foresight

    found = Foresight(machine)
    return {"foresee": found.foresee if foretells else None, "choose_rows": found.choose_rows}
