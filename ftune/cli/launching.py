"""What `ftune launch`, `ftune resume --gpus` and `ftune doctor --launch` share: checks, plans, and their execution."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import typer

from ftune.errors import MachineError, Problem, RecipeError, RunError
from ftune.launch import Interface, LaunchPlan, Layout, agent_plan, node_command
from ftune.machine import Machine, probe
from ftune.resolve import RunSpec

_PREFLIGHT_SUFFIX = ".preflight"
_JOB_JOIN_SECONDS = 600
_USERS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL")
"""Settings of libraries, which somebody may have had a reason to choose."""


def check_words(given: Layout, gpus: int | None, *, scheduled: bool = False) -> None:
    """Raise RecipeError where the options of a launch make no sense together; forget what a cluster says of ranks."""
    from ftune.ranks import network, watch

    watch.forget_rank()

    def refuse(what: str, fix: str) -> None:
        raise RecipeError(Problem("launch-options", what, fix=fix))

    if gpus is None and (given.on_cpu or scheduled):
        refuse("--gpus says how many processes there are on each node", "add --gpus 2")
    if (gpus is not None and gpus < 1) or given.nodes < 1:
        refuse("a launch has at least one process and one node", "set --gpus and --nodes to 1 or more")
    if not 0 <= given.node_rank < given.nodes:
        refuse(f"there is no node {given.node_rank} among {given.nodes}", "--node-rank counts from 0 to nodes - 1")
    if given.max_restarts < 0 or given.hang_seconds < 0 or given.join_seconds < 1:
        refuse("restarts and times cannot be negative", "leave the option out for its default")
    if given.nodes > 1 and not scheduled:
        try:
            network.split(given.rendezvous)
        except ValueError:
            fix = (
                "add --rendezvous HOST:PORT: an address of the first node that the others reach, such as 10.0.0.1:29400"
            )
            refuse("several nodes have to meet somewhere", fix)


def machine_of(given: Layout, gpu: str | None = None) -> Machine:
    """Return this machine as the ranks will see it; with `gpu` what a node of the cluster has."""
    machine = probe()
    if given.on_cpu:
        return replace(machine, gpus=(), unknown_device="")
    if gpu is None:
        return machine
    from ftune.machine import Gpu
    from ftune.memory.gpus import find_gpu

    found = find_gpu(gpu)
    return replace(machine, gpus=(Gpu(found.name, found.memory_bytes, found.capability),) * given.ranks_per_node)


def laid_out(given: Layout, gpus: int | None, machine: Machine) -> Layout:
    """Return the layout with a process for each GPU where none was said; raises MachineError without enough of them."""
    count = len(machine.gpus)
    wanted = count if gpus is None else gpus
    if not given.on_cpu and (wanted > count or count == 0):
        what = f"--gpus {wanted or 1}: {_host()} has {count or 'no'} GPU{'' if count == 1 else 's'}"
        fix = f"set --gpus {count}" if count else "train on the processor: add --cpu and --gpus N"
        raise MachineError(Problem("gpus-missing", what, fix=fix))
    return replace(given, ranks_per_node=wanted)


def _host() -> str:
    import socket

    return socket.gethostname()


def decided(recipe: str, changes: Sequence[str], machine: Machine, stream: TextIO) -> RunSpec:
    """Return everything decided, and say it; raises all errors at once."""
    from ftune.cli import console
    from ftune.resolve import examine, raise_errors, resolve

    loaded, problems = examine(recipe, changes, machine)
    raise_errors(problems)
    assert loaded is not None
    spec = resolve(loaded, machine)
    console.print_problems(problems, stream=sys.stderr)
    console.print_decisions(spec.decisions, stream=stream)
    stream.flush()
    return spec


def begin(
    spec: RunSpec,
    layout: Layout,
    machine: Machine,
    *,
    plain: bool,
    words: Sequence[str],
    dry_run: bool,
    start: bool,
) -> None:
    """Write the run directory and train in it, from this node as the first one."""
    from ftune.training import directory as directories

    directory = Path(spec.recipe.training.output_dir)
    plan = node_plan(directory, layout, machine, ranks=["--plain"] if plain else [], digest=_digest(spec))
    if dry_run:
        print("# first, the run directory:")
        print(shlex.join(words))
        print("# then, the ranks of this node:")
        print(plan.as_command())
        _tell_others(directory, layout)
        return
    directories.create(spec)
    if not start:
        print(f"wrote {directory}")
        return
    if layout.nodes > 1:
        _tell_others(directory, layout)
    follow(directory, layout, plan)


def _tell_others(directory: Path, layout: Layout) -> None:
    for number in range(1, layout.nodes):
        print(f"# on node {number}:")
        print(shlex.join(node_command(directory, layout, node_rank=number, rendezvous=layout.rendezvous)), flush=True)


def join(recipe: str, changes: Sequence[str], layout: Layout, machine: Machine, *, plain: bool, dry_run: bool) -> None:
    """Take part in a launch as another node than the first, which makes the run directory."""
    from ftune.resolve import examine, raise_errors, resolve

    loaded, problems = examine(recipe, changes, machine, trains=False)
    raise_errors(problems)
    assert loaded is not None
    spec = resolve(loaded, machine, fingerprints=False)
    directory = Path(spec.recipe.training.output_dir)
    plan = node_plan(directory, layout, machine, ranks=["--plain"] if plain else [], digest=_digest(spec))
    if dry_run:
        print(plan.as_command())
        return
    follow(directory, layout, plan)


def _digest(spec: RunSpec) -> str:
    """Return what tells whether two nodes were started with the same recipe and changes."""
    from ftune.digest import sha256_of_text

    return sha256_of_text("\n".join([spec.recipe_text, *spec.overrides]))


def node_plan(
    directory: Path, layout: Layout, machine: Machine, *, ranks: Sequence[str] = (), digest: str = ""
) -> LaunchPlan:
    """Return what starts the ranks of this node."""
    from ftune.ranks import network

    meets: Interface = network.loopback() if layout.nodes == 1 else network.toward(layout.rendezvous)
    plan = agent_plan(directory, layout, meets, cpu_cores=machine.cpu_cores, ranks=ranks, recipe_digest=digest)
    # What the user has set himself goes before what ftune would set.
    kept = {name: os.environ[name] for name in _USERS if name in plan.environment and name in os.environ}
    return replace(plan, environment={**plan.environment, **kept})


def follow(directory: Path, layout: Layout, plan: LaunchPlan) -> None:
    """Start the ranks of this node and see them through; raises what they failed of first."""
    from ftune import rundir
    from ftune.cli import crash
    from ftune.ranks import network, records
    from ftune.ranks.watch import Watch

    if layout.nodes > 1 and layout.node_rank == 0:
        network.check_port(layout.rendezvous)
    elif layout.nodes > 1:
        network.wait_for(layout.rendezvous, layout.join_seconds)
    cause = Watch(directory, plan, max_restarts=layout.max_restarts).run()
    if cause is None:
        return
    if cause.kind == "crash":
        print(f"rank {cause.rank} on {cause.host} failed", file=sys.stderr)
        raise typer.Exit(crash.report(cause.traceback))
    if cause.kind in records.RESTARTED and rundir.checkpoints(directory):
        again = f"go on with: ftune resume {directory} {shlex.join(layout.options())}"
        first, *rest = cause.problems
        cause = replace(cause, problems=(replace(first, fix="; or ".join(filter(None, (again, first.fix)))), *rest))
    raise cause.error()


def preflight(recipe: str, given: Layout, gpus: int | None) -> None:
    """Start the ranks of a launch, have them compare their hosts, and let them go; raises what is wrong.

    They meet in a folder beside the run directory, which is made for it and removed again.
    """
    from ftune import rundir
    from ftune.resolve import examine, raise_errors, resolve

    check_words(given, gpus)
    machine = machine_of(given)
    layout = laid_out(given, gpus, machine)
    loaded, problems = examine(recipe, (), machine, trains=False)
    raise_errors(problems)
    assert loaded is not None
    spec = resolve(loaded, machine)
    home = Path(spec.recipe.training.output_dir)
    directory = home.with_name(home.name + _PREFLIGHT_SUFFIX)
    plan = node_plan(directory, layout, machine, ranks=["--preflight"], digest=_digest(spec))
    if layout.node_rank > 0:
        follow(directory, layout, plan)
        return
    shutil.rmtree(directory, ignore_errors=True)
    try:
        directory.mkdir(parents=True)
        rundir.write_text(directory / rundir.RUN, spec.to_json())
        if layout.nodes > 1:
            print(f"start the other nodes with the same words and --node-rank 1 to {layout.nodes - 1}", flush=True)
        follow(directory, layout, plan)
    except OSError as error:
        fix = "choose a training.output_dir you can write to"
        raise RunError(Problem("output-dir", f"cannot write to {directory}", why=str(error), fix=fix)) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def submit(spec: RunSpec, layout: Layout, options: Sequence[str], *, dry_run: bool, start: bool) -> None:
    """Write the run directory and SLURM's batch file, and hand it over."""
    from ftune.launch.slurm import slurm_plan
    from ftune.training import directory as directories

    directory = Path(spec.recipe.training.output_dir)
    # The first node may have a large checkpoint to look through before it opens its port.
    layout = replace(layout, join_seconds=max(layout.join_seconds, _JOB_JOIN_SECONDS))
    plan = slurm_plan(directory, layout, folder=Path.cwd(), options=options)
    ((path, text),) = plan.files.items()
    if dry_run:
        print(f"# {path}:\n{text}# then:\n{plan.as_command()}")
        return
    if start and shutil.which("sbatch") is None:
        what, fix = "there is no sbatch here", "run this where SLURM is; or add --no-start, and submit the file there"
        raise MachineError(Problem("sbatch-missing", what, why="--slurm hands a batch file to it", fix=fix))
    directories.create(spec)
    _write(plan)
    print(f"wrote {path}")
    if not start:
        return
    done = subprocess.run(plan.argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        what, why = "sbatch refused the job", done.stderr.strip()[:500]
        fix = f"correct it with --sbatch KEY=VALUE, or in the file, and then: {plan.as_command()}"
        raise MachineError(Problem("sbatch-refused", what, why=why, fix=fix))
    print(f"{done.stdout.strip()}; {plan.note}")


def write_manifest(
    recipe: str, changes: Sequence[str], layout: Layout, *, image: str, volume: str, dry_run: bool
) -> None:
    """Write a manifest for Kubeflow, with the recipe in it; what the pods have is looked at there."""
    from ftune.cli import console
    from ftune.launch.kubernetes import kubernetes_plan
    from ftune.recipe import load
    from ftune.resolve import raise_errors
    from ftune.rules import check

    loaded = load(recipe, changes)
    problems = check(loaded, None)
    raise_errors(problems)
    console.print_problems(problems, stream=sys.stderr)
    claim, _, mount = volume.partition(":")
    directory = Path(loaded.recipe.training.output_dir)
    if not image or not claim or not mount.startswith("/"):
        what = "a manifest needs the image that the pods run and the volume that they share"
        fix = "add --image registry/ftune:1 --volume CLAIM:/runs"
        raise RecipeError(Problem("launch-options", what, fix=fix))
    if not directory.is_relative_to(mount):
        what = f"training.output_dir is {directory}, which is not on the volume that the pods share"
        fix = f"set it to a folder in {mount}: --set training.output_dir={mount}/{directory.name}"
        raise RunError(Problem("output-not-shared", what, why="all ranks write one checkpoint", fix=fix))
    plan = kubernetes_plan(
        directory,
        layout,
        recipe=loaded.source.text,
        overrides=changes,
        image=image,
        volume=(claim, mount),
        output=Path(f"ftune-{directory.name}.yaml"),
    )
    if not dry_run:
        _write(plan)
    for path, text in plan.files.items():
        print(f"# {path}:\n{text}# then:" if dry_run else f"wrote {path}; then:")
    print(plan.as_command())
    print(f"# {plan.note}")


def _write(plan: LaunchPlan) -> None:
    from ftune import rundir

    for name, text in plan.files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        rundir.write_text(Path(name), text)
