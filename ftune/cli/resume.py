"""`ftune resume`: go on with a run that was stopped."""

from typing import Annotated

import typer


def resume(
    run_directory: Annotated[str, typer.Argument(help="The run directory.", metavar="RUN_DIR")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.", metavar="S.K=V")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of a progress bar.")] = False,
) -> None:
    """Continue a run from its last checkpoint, to the same weights as if it had never stopped.

    Example: ftune resume runs/my-run
    """
    import os
    import sys
    from pathlib import Path

    from ftune.cli import console
    from ftune.machine import probe
    from ftune.training import resuming, run

    continued = resuming.reopen(Path(run_directory), override or (), probe())
    if os.environ.get("RANK", "0") == "0":
        for line in continued.notes:
            print(line)
        console.print_decisions(continued.spec.decisions)
        sys.stdout.flush()
    run.train(continued.spec, plain=plain, checkpoint=continued.checkpoint)
