"""`ftune rebuild`: the trained model again, from its base and a log of 12 bytes a step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def rebuild(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run of the optimizers mezo or sparse_mezo.")],
    output: Annotated[Path, typer.Option(help="The folder to write the model to; must be new or empty.")],
    step: Annotated[int | None, typer.Option(min=0, help="Rebuild the weights after this step, not the last.")] = None,
) -> None:
    """Rebuild a model that was trained with forward passes only, bit for bit, from its base and its log.

    Of the run directory only run.json, zeroth_order.log and, with sparse_mezo, zeroth_order.safetensors are read.

    Example: ftune rebuild runs/my-run --output rebuilt/my-model
    """
    from ftune import rebuild as rebuilding

    made = rebuilding.rebuild(run_dir, output, steps=step, say=lambda line: typer.echo(line, err=True))
    typer.echo(f"{made.directory}: the model after step {made.steps}")
