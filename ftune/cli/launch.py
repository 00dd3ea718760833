"""`ftune launch`: train on several processes, here, on several nodes, or by a batch system."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftune.launch import Layout

Gpus = Annotated[int | None, typer.Option("--gpus", metavar="N", help="Processes on each node, one for each GPU.")]
Nodes = Annotated[int, typer.Option("--nodes", metavar="M", help="How many machines take part.")]
NodeRank = Annotated[int, typer.Option("--node-rank", metavar="K", help="Which of them this is; the first is 0.")]
Rendezvous = Annotated[
    str, typer.Option("--rendezvous", metavar="HOST:PORT", help="An address of the first node, and a free port there.")
]
Cpu = Annotated[bool, typer.Option("--cpu", help="Train on the processor, whatever GPUs there are.")]
MaxRestarts = Annotated[
    int, typer.Option("--max-restarts", metavar="R", help="How often lost ranks are started again, from a checkpoint.")
]
HangTimeout = Annotated[
    int,
    typer.Option("--hang-timeout", metavar="S", help="Seconds without any work before a run is ended; 0: never."),
]
JoinTimeout = Annotated[int, typer.Option("--join-timeout", metavar="S", help="Seconds to wait for the other nodes.")]


def launch(
    recipe: Annotated[str, typer.Argument(help="The recipe file.", metavar="RECIPE")],
    gpus: Gpus = None,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = "",
    cpu: Cpu = False,
    max_restarts: MaxRestarts = 0,
    hang_timeout: HangTimeout = 30,
    join_timeout: JoinTimeout = 60,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write a batch file and submit it with sbatch.")] = False,
    sbatch: Annotated[
        list[str] | None, typer.Option("--sbatch", metavar="K=V", help="With --slurm: an option of sbatch's.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="With --slurm: the GPU of the nodes, if there is none here."),
    ] = None,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="Write a manifest for Kubeflow.")] = False,
    image: Annotated[str, typer.Option(metavar="NAME", help="With --kubernetes: a container image with ftune.")] = "",
    volume: Annotated[
        str, typer.Option(metavar="CLAIM:PATH", help="With --kubernetes: the claim that all pods mount, and where.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and leave.")] = False,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Whether to start what was written.")] = True,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.", metavar="S.K=V")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of a progress bar.")] = False,
) -> None:
    """Train on several processes: on this machine, on several, or by SLURM or Kubernetes.

    Example: ftune launch recipe.yaml --gpus 8
    """
    import sys

    from ftune.cli import launching
    from ftune.launch import Layout

    changes = override or []
    given = Layout(gpus or 0, nodes, node_rank, rendezvous, cpu, max_restarts, hang_timeout, join_timeout)
    launching.check_words(given, gpus, scheduled=slurm or kubernetes)
    if kubernetes:
        launching.write_manifest(recipe, changes, given, image=image, volume=volume, dry_run=dry_run)
        return
    machine = launching.machine_of(given, gpu if slurm else None)
    layout = launching.laid_out(given, gpus, machine)
    if node_rank > 0:
        launching.join(recipe, changes, layout, machine, plain=plain, dry_run=dry_run)
        return
    # A dry run has commands on its output, and nothing else.
    spec = launching.decided(recipe, changes, machine, sys.stderr if dry_run else sys.stdout)
    if slurm:
        launching.submit(spec, layout, sbatch or [], dry_run=dry_run, start=start)
    else:
        words = _words(recipe, changes, layout)
        launching.begin(spec, layout, machine, plain=plain, words=words, dry_run=dry_run, start=start)


def _words(recipe: str, changes: Sequence[str], layout: Layout) -> list[str]:
    """Return the command that writes a run directory and starts nothing."""
    from ftune.launch.plan import option_words

    words = ["ftune", "launch", recipe, *layout.options(), *option_words(changes), "--no-start"]
    return [*words, "--rendezvous", layout.rendezvous] if layout.nodes > 1 else words
