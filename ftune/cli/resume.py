"""`ftune resume`: go on with a run that was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ftune.cli.launch import Cpu, Gpus, HangTimeout, JoinTimeout, MaxRestarts, NodeRank, Nodes, Rendezvous

if TYPE_CHECKING:
    from ftune.launch import Layout


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
    gpus: Gpus = None,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = "",
    cpu: Cpu = False,
    max_restarts: MaxRestarts = 0,
    hang_timeout: HangTimeout = 30,
    join_timeout: JoinTimeout = 60,
) -> None:
    """Continue a run from its last checkpoint, to the same weights as if it had never stopped.

    With --gpus it goes on as a launch does. Example: ftune resume runs/my-run
    """
    if gpus is not None or nodes > 1 or cpu:
        from ftune.launch import Layout

        given = Layout(gpus or 0, nodes, node_rank, rendezvous, cpu, max_restarts, hang_timeout, join_timeout)
        _launch(run_directory, override or (), given, gpus, plain=plain)
        return
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


def _launch(run_directory: str, changes: Sequence[str], given: Layout, gpus: int | None, *, plain: bool) -> None:
    """Go on with several processes; nodes but the first look at nothing: the first one may yet write it."""
    import sys
    from pathlib import Path

    from ftune.cli import console, launching

    launching.check_words(given, gpus)
    machine = launching.machine_of(given)
    layout = launching.laid_out(given, gpus, machine)
    directory = Path(run_directory).expanduser().resolve()
    if layout.node_rank == 0:
        from ftune.training import resuming

        continued = resuming.reopen(directory, changes, machine, ranks=layout.ranks)
        for line in continued.notes:
            print(line)
        console.print_decisions(continued.spec.decisions)
        sys.stdout.flush()
    plan = launching.node_plan(directory, layout, machine, ranks=["--plain"] if plain else [])
    launching.follow(directory, layout, plan)
