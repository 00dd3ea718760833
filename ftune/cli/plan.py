"""`ftune plan`: what a run needs of a GPU, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ftune.memory.fit import Fit

_FIRST_FIT = "write what fits with --fit --write FILE, then ask for the page of that recipe"


def plan(
    recipe: Annotated[str, typer.Argument(help="The recipe file.", metavar="RECIPE")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.", metavar="S.K=V")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME|SIZE", help="A GPU by name (a100-80gb, 4090) or by memory (24GiB).")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, metavar="N", help="How many GPUs of a node share the run.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, metavar="M", help="How many nodes do.")] = 1,
    fit: Annotated[bool, typer.Option("--fit", help="Find the cheapest changes with which it fits.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="With --fit: what may be given up (qlora, lomo, bfloat16, max_length)."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --fit: write the recipe with the changes.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan as one HTML page, with all layers followed.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="How long following one step may take.")
    ] = 600,
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

        _refuse_beside_fit(html=html is not None, devices=gpus * nodes)
        found_fit = search(recipe, override or (), gpu=gpu, allow=allow or (), timeout_seconds=timeout)
        _tell(found_fit, write, as_json=as_json)
        return
    found = ask(recipe, override or (), gpu=gpu, timeout_seconds=timeout, whole=html is not None, ranks=gpus * nodes)
    if html is not None:
        from ftune.memory import page

        print(f"wrote {page.write(html, found)}", file=sys.stderr)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        console.print_problems(found.problems, stream=sys.stderr)
        console.print_decisions(found.decisions)
        show(found.spec, found.plan, sys.stdout)
    if found.plan.fits is False:
        raise typer.Exit(3)


def _refuse_beside_fit(*, html: bool, devices: int) -> None:
    from ftune.errors import Problem, RecipeError

    if html:
        raise RecipeError(Problem("plan-html", "--html shows one plan, and --fit makes many", fix=_FIRST_FIT))
    if devices > 1:
        raise RecipeError(Problem("plan-fit-devices", "--fit searches for one device", fix="leave --gpus out"))


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
