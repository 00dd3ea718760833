"""`ftune preview`: rows as the model will see them, and the audit of all of them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Part(str, Enum):
    """Which rows."""

    train = "train"
    eval = "eval"


def preview(
    recipe: Annotated[str, typer.Argument(help="The recipe file.", metavar="RECIPE")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.", metavar="S.K=V")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=0, help="How many rows of each source to show: 3, in a page 100.")
    ] = None,
    part: Annotated[Part, typer.Option(help="Rows of training or of evaluation.")] = Part.train,
    problem: Annotated[str | None, typer.Option(metavar="KIND", help="Only rows with this finding.")] = None,
    positions: Annotated[bool, typer.Option("--positions", help="Each token with its position and id.")] = False,
    packing: Annotated[bool, typer.Option("--packing", help="The first packed sequences instead of rows.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a row, then the audit.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML page, with examples of every finding.")
    ] = None,
) -> None:
    """Show rows token by token with what is learned, then what is odd about all rows; trains nothing.

    The rows are read and counted as `ftune train` would, and kept for it. Nothing is written into the run directory.

    Example: ftune preview recipe.yaml --rows 5
    """
    import sys

    from ftune.cli import console
    from ftune.machine import probe
    from ftune.resolve import examine, raise_errors, resolve

    machine = probe()
    loaded, problems = examine(recipe, override or (), machine, trains=False)
    raise_errors(problems)
    assert loaded is not None
    console.print_problems(problems, stream=sys.stderr)
    decided = resolve(loaded, machine, fingerprints=False).recipe

    from ftune.preview import Wanted, show

    count = (100 if html else 3) if rows is None else rows
    wanted = Wanted(rows=count, part=part.value, problem=problem, positions=positions, packing=packing)
    show(decided, wanted, name=recipe, as_json=as_json, html=html)
