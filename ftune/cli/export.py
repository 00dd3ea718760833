"""`ftune export`: write a run for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run.")],
    format: Annotated[
        str,
        typer.Option(help="safetensors, adapter, gguf, hub, nf4, low_bit, torchao; `ftune explain` says more."),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write to; must be new or empty.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="How weights are stored: float32, bfloat16, float16; for gguf also q8_0. Default: as now."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Largest weight file, for formats with shards; also what writing takes. Default: 5GB."),
    ] = None,
) -> None:
    """Write a run's model for other tools, and prove that the files say what the run's model says.

    The run's saved prompts are asked of both. Above the format's tolerance nothing is kept.

    Example: ftune export runs/my-run --format gguf --dtype q8_0 --output exported/my-model
    """
    from ftune import export as exporting

    made = exporting.export(
        run_dir,
        output,
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        say=lambda line: typer.echo(line, err=True),
    )
    allowed = f"allowed: {made.tolerance}" if made.tolerance else "what rounding costs"
    if made.folded is not None:
        typer.echo(f"merged, before rounding: mean KL {made.folded:.2g}; every weight that was written is its rounding")
    typer.echo(
        f"{made.format} beside the run on {made.prompts} prompts: largest logit difference {made.max_difference:.2g}, "
        f"mean KL {made.mean_divergence:.2g} ({allowed}), "
        f"loss {made.losses[0]:.4f} -> {made.losses[1]:.4f}"
    )
    typer.echo(f"{made.directory}: {made.dtype}, loads with {made.read_by}")
