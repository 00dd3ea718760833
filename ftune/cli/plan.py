"""`ftune plan`: what a run needs of a GPU, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ftune.memory.fit import Fit


def plan(
    recipe: Annotated[str, typer.Argument(help="The recipe file.", metavar="RECIPE")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.", metavar="S.K=V")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME|SIZE", help="A GPU by name (a100-80gb, 4090) or by memory (24GiB).")
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Find the cheapest changes with which it fits.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="With --fit: what may be given up (qlora, lomo, bfloat16, max_length)."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --fit: write the recipe with the changes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the peak memory and the time of a step, from the model's config.json alone.

    One step of the run is traced without weights and without a GPU. Exits with 3 where it does not fit.

    Example: ftune plan recipe.yaml --gpu 4090 --fit --write smaller.yaml
    """
    import json
    import sys

    from ftune.cli import console
    from ftune.memory.ask import ask
    from ftune.memory.shown import show

    if fit or write is not None or allow:
        from ftune.memory.fit import fit as search

        _tell(search(recipe, override or (), gpu=gpu, allow=allow or ()), write, as_json=as_json)
        return
    found = ask(recipe, override or (), gpu=gpu)
    if as_json:
        print(json.dumps(found.plan.as_json(), indent=2))
    else:
        console.print_problems(found.problems, stream=sys.stderr)
        show(found.spec, found.plan, sys.stdout)
    if found.plan.fits is False:
        raise typer.Exit(3)


def _tell(found: Fit, path: Path | None, *, as_json: bool) -> None:
    """Print what a search found, and write the recipe."""
    import json
    import sys

    from ftune.cli import console
    from ftune.memory.fit import write
    from ftune.memory.shown_fit import show_fit

    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        console.print_problems(found.problems, stream=sys.stderr)
        show_fit(found, sys.stdout)
    if not found.fits:
        raise typer.Exit(3)
    if path is not None:
        write(found, path)
        print(f"wrote {path}", file=sys.stderr)
