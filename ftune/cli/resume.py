"""`ftune resume`: go on with a run that was stopped."""

from typing import Annotated

import typer


def resume(
    run_directory: Annotated[str, typer.Argument(help="The run directory.", metavar="RUN_DIR")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.", metavar="S.K=V")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of a progress bar.")] = False,
    plan: Annotated[
        bool | None, typer.Option(help="Predict the memory of the largest batch first.", show_default="on a GPU")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train even where the plan does not fit.")] = False,
) -> None:
    """Continue a run from its last checkpoint, to the same weights as if it had never stopped.

    Example: ftune resume runs/my-run
    """
    import os
    import sys
    from pathlib import Path

    from ftune.cli import console
    from ftune.cli.train import foresight
    from ftune.machine import probe
    from ftune.training import resuming, run

    machine = probe()
    continued = resuming.reopen(Path(run_directory), override or (), machine)
    if os.environ.get("RANK", "0") == "0":
        for line in continued.notes:
            print(line)
        console.print_decisions(continued.spec.decisions)
        sys.stdout.flush()
    foresees = foresight(continued.spec, machine, plan)
    run.train(continued.spec, plain=plain, checkpoint=continued.checkpoint, force=force, **foresees)
