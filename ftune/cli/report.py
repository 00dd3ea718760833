"""`ftune report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run directory; the run need not be over.")],
) -> None:
    """Write a run as one HTML file: result, curves, samples, decisions, recipe.

    It is report.html in the run directory. It loads nothing from anywhere, so it can be sent and kept.

    Example: ftune report runs/my-run
    """
    from ftune.report import write

    typer.echo(write(run_dir))
