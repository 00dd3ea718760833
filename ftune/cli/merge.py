"""`ftune merge`: fold an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run that trained an adapter.")],
    output: Annotated[Path, typer.Option(help="The folder to write the merged model to; must be new or empty.")],
) -> None:
    """Fold an adapter into its base, and prove that the result says what the adapter says.

    The base is read, merged and written one tensor at a time. The result is loaded again and compared with the
    adapter before it gets its name.

    Example: ftune merge runs/my-run --output merged/my-model
    """
    from ftune import export

    made = export.merge(run_dir, output, say=lambda line: typer.echo(line, err=True))
    typer.echo(
        f"merged == adapter on {made.prompts} prompts: largest logit difference {made.max_difference:.2g}, "
        f"mean KL {made.mean_divergence:.2g}"
    )
    typer.echo(f"{made.directory}: {made.dtype}, loads with plain transformers")
