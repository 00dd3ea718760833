"""How many ranks, where, and the command that starts those of one node."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftune import rundir

HANG_SECONDS = "FTUNE_HANG_SECONDS"
RECIPE_DIGEST = "FTUNE_RECIPE_DIGEST"
NODE = "FTUNE_NODE"

_MONITOR_SECONDS = 0.2
_SHUTDOWN_SECONDS = 10
"""What a rank has to end after another one failed: there is nothing left for it to save."""
_READ_SECONDS = 20
"""How long an agent waits for the first node to answer: torchrun's 60 would be the whole minute."""


@dataclass(frozen=True)
class Layout:
    """How many processes there are and where; what the user said on the command line."""

    ranks_per_node: int
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str = ""
    """HOST:PORT of the first node; empty where there is one node."""
    on_cpu: bool = False
    max_restarts: int = 0
    hang_seconds: int = 30
    join_seconds: int = 60

    @property
    def ranks(self) -> int:
        """How many processes train, over all nodes."""
        return self.nodes * self.ranks_per_node

    def options(self) -> list[str]:
        """Return the options of `ftune launch` and `ftune resume` that say this, but for the node's own."""
        words = ["--gpus", str(self.ranks_per_node)]
        words += ["--nodes", str(self.nodes)] if self.nodes > 1 else []
        words += ["--cpu"] if self.on_cpu else []
        plain = Layout(self.ranks_per_node)
        for option, name in _OPTIONS.items():
            if getattr(self, name) != getattr(plain, name):
                words += [option, str(getattr(self, name))]
        return words


_OPTIONS = {"--max-restarts": "max_restarts", "--hang-timeout": "hang_seconds", "--join-timeout": "join_seconds"}


@dataclass(frozen=True)
class Interface:
    """The way from a node to the first one."""

    address: str
    """This node's own."""
    name: str
    """Of the network device that has it; empty where none is known to."""


@dataclass(frozen=True)
class LaunchPlan:
    """What is executed: words, what they find in their environment, files that are written first, a word on it all."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    """Text by path."""
    note: str = ""

    def as_command(self) -> str:
        """Return a line that can be pasted into a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*settings, shlex.join(self.argv)])


def agent_plan(
    directory: Path,
    layout: Layout,
    interface: Interface,
    *,
    cpu_cores: int,
    ranks: Sequence[str] = (),
    recipe_digest: str = "",
) -> LaunchPlan:
    """Return what starts the ranks of one node: torchrun's agent, whose ranks read the run directory's run.json.

    `ranks` are options of theirs: `--plain`, or `--preflight`, after which they leave.
    """
    # torchrun looks for the store's host by comparing names, and fails where a name leads to 127.0.0.1.
    settings = {
        "is_host": str(int(layout.node_rank == 0)),
        "join_timeout": str(layout.join_seconds),
        "read_timeout": str(_READ_SECONDS),
    }
    options = {
        "nnodes": str(layout.nodes),
        "nproc-per-node": str(layout.ranks_per_node),
        "rdzv-backend": "c10d",
        "rdzv-endpoint": layout.rendezvous or f"{interface.address}:0",
        "rdzv-id": "ftune",  # a name of the run would keep hosts apart that see it elsewhere, and are to be told so
        "rdzv-conf": ",".join(f"{name}={value}" for name, value in settings.items()),
        "local-addr": interface.address,
        "max-restarts": str(layout.max_restarts),
        "monitor-interval": str(_MONITOR_SECONDS),
        "shutdown-timeout": str(_SHUTDOWN_SECONDS),
    }
    options["log-dir"] = str(directory / rundir.LAUNCH / "logs")
    # The first rank of a node speaks here; what the others print lies in files.
    if others := [f"{rank}:3" for rank in range(1, layout.ranks_per_node)]:
        options["redirects"] = ",".join(others)
    words = [f"--{name}={value}" for name, value in options.items()]
    return LaunchPlan(
        (sys.executable, "-m", "ftune.ranks.agent", *words, "-m", "ftune.training", str(directory), *ranks),
        _environment(layout, interface, cpu_cores, recipe_digest),
    )


def _environment(layout: Layout, interface: Interface, cpu_cores: int, recipe_digest: str) -> dict[str, str]:
    found = {
        HANG_SECONDS: str(layout.hang_seconds),
        # Otherwise each rank would take all cores for itself.
        "OMP_NUM_THREADS": str(max(1, cpu_cores // layout.ranks_per_node)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # Ranks that are started again would find in the agents' store the addresses of those before, and wait for them.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if interface.name:
        # Without it gloo asks what this host's name stands for, which often is 127.0.0.1.
        found["GLOO_SOCKET_IFNAME"] = interface.name
    if layout.nodes > 1:
        found[NODE] = str(layout.node_rank)
    if recipe_digest:
        found[RECIPE_DIGEST] = recipe_digest
    if layout.on_cpu:
        found["CUDA_VISIBLE_DEVICES"] = ""
    elif layout.nodes > 1 and interface.name:
        found["NCCL_SOCKET_IFNAME"] = interface.name
    return found


def node_command(directory: Path | str, layout: Layout, *, node_rank: int | str, rendezvous: str) -> list[str]:
    """Return what a node runs to take part in a launch whose run directory is there."""
    words = [sys.executable, "-m", "ftune", "resume", str(directory), *layout.options()]
    return [*words, "--node-rank", str(node_rank), "--rendezvous", rendezvous]


def option_words(changes: Sequence[str]) -> list[str]:
    """Return changes as the `--set` options they came from."""
    return [word for change in changes for word in ("--set", change)]
