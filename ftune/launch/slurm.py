"""The batch file with which SLURM starts a launch on several nodes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ftune import rundir
from ftune.launch.plan import LaunchPlan, Layout, node_command

FILE = "slurm.sh"
_STOP_SECONDS = 120
"""Before a job's time is over: room for the step that runs, and for a checkpoint."""


def slurm_plan(directory: Path, layout: Layout, *, folder: Path, options: Sequence[str] = ()) -> LaunchPlan:
    """Return the batch file of a run whose directory is there, and the command that submits it.

    `folder` is where the job runs, as the launch did, and `options` are more of sbatch's, such as `partition=gpu`.
    """
    path = directory / rundir.LAUNCH / FILE
    note = f"SLURM's and ftune's words go to {path.parent}/slurm-JOB.log"
    return LaunchPlan(("sbatch", str(path)), files={str(path): _text(directory, layout, folder, options)}, note=note)


def _text(directory: Path, layout: Layout, folder: Path, options: Sequence[str]) -> str:
    settings = {
        "job-name": "ftune-" + re.sub(r"[^\w.-]", "_", directory.name),
        "nodes": str(layout.nodes),
        "ntasks-per-node": "1",
        **({} if layout.on_cpu else {"gpus-per-node": str(layout.ranks_per_node)}),
        "output": str(directory / rundir.LAUNCH / "slurm-%j.log"),
        "open-mode": "append",
        "requeue": "",
        "signal": f"TERM@{_STOP_SECONDS}",
    }
    for option in options:
        name, _, value = option.removeprefix("--").partition("=")
        settings[name] = value
    lines = [f"#SBATCH --{name}{'=' + shlex.quote(value) if value else ''}" for name, value in settings.items()]
    command = shlex.join(node_command(directory, layout, node_rank="@RANK@", rendezvous="@PLACE@"))
    command = command.replace("@RANK@", '"$SLURM_NODEID"').replace("@PLACE@", '"$rendezvous"')
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Trains {directory}: its run.json says everything. Requeued, it goes on from the last checkpoint.",
            *lines,
            "",
            f"cd {shlex.quote(str(folder))} || exit 5",
            "# The nodes meet at the first one, by the address under which SLURM itself reaches it.",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "address=$(scontrol show node \"$first\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p' | head -n 1)",
            'export rendezvous="${address:-$first}:$((20000 + SLURM_JOB_ID % 20000))"',
            "# One ftune on each node, which starts the ranks there; the exit code is that of the first cause.",
            f"exec srun --nodes={layout.nodes} --ntasks={layout.nodes} --ntasks-per-node=1 --kill-on-bad-exit=0 \\",
            f"  bash -c {shlex.quote('exec ' + command)}",
            "",
        ]
    )
