"""`ftune plan`: what a run needs of a GPU, before it begins."""

from typing import Annotated

import typer


def plan(
    recipe: Annotated[str, typer.Argument(help="The recipe file.", metavar="RECIPE")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.", metavar="S.K=V")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME|SIZE", help="A GPU by name (a100-80gb, 4090) or by memory (24GiB).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the peak memory and the time of a step, from the model's config.json alone.

    One step of the run is traced without weights and without a GPU. Exits with 3 where it does not fit.

    Example: ftune plan recipe.yaml --gpu 4090
    """
    import json
    import sys

    from ftune.cli import console
    from ftune.memory.ask import ask
    from ftune.memory.shown import show

    found = ask(recipe, override or (), gpu=gpu)
    if as_json:
        print(json.dumps(found.plan.as_json(), indent=2))
    else:
        console.print_problems(found.problems, stream=sys.stderr)
        show(found.spec, found.plan, sys.stdout)
    if found.plan.fits is False:
        raise typer.Exit(3)
