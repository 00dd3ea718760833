"""torchrun's agent, which starts the ranks of a node and starts them anew; besides, it writes down how they ended.

`python -m ftune.ranks.agent` takes torchrun's own options. What torchrun itself would print of a failure, a traceback
of its own and a table, says of the first cause an exit code; here each failure becomes a record, of which the launcher
shows the first.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters, registry
from torch.distributed.run import config_from_args, parse_args

from ftune.errors import Problem
from ftune.launch.plan import HANG_SECONDS
from ftune.ranks import life, records
from ftune.ranks.heart import Heart

STOP = signal.SIGUSR1
"""Ends an agent and its ranks. Ctrl-C and SIGTERM are for the launcher alone, which has ranks end after their step."""


_PARTING_SECONDS = 24 * 3600
"""How long the agents of ranks that are done wait for the others: the first rank may still write a large model."""
_ENDED_BY = (signal.SIGTERM, signal.SIGINT, STOP)


class Agent(LocalElasticAgent):
    """Starts the ranks of this node, and writes down how each one that failed did."""

    def __init__(self, directory: Path, meeting: str, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.directory, self.meeting = directory, meeting
        self.heart: Heart | None = None
        """None unless ranks run that are watched."""
        self.before = records.names(records.folders(directory))

    def attempt(self) -> int:
        """Return how often the ranks have been started anew."""
        return int(self._worker_group.spec.max_restarts - self._remaining_restarts)

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        processes = super()._start_workers(worker_group)
        limit = float(os.environ.get(HANG_SECONDS, "0"))
        if limit > 0 and worker_group.workers[0].world_size > 1:
            self.heart = Heart(
                worker_group,
                list(processes.values()),
                records.folders(self.directory),
                meeting=self.meeting,
                attempt=self.attempt(),
                limit_seconds=limit,
            )
            self.heart.begin()
        return processes

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            # Those that the agent ended itself, since one had failed, are in the same list.
            own = {rank: failure for rank, failure in result.failures.items() if -failure.exitcode not in _ENDED_BY}
            for rank, failure in sorted((own or result.failures).items()):
                self._note(rank, failure)
        return result

    def _note(self, rank: int, failure: Any) -> None:
        """Write down a rank that could not do so itself; what the agent ended is no failure."""
        ended = self.heart is not None and self.heart.ended
        told = any(
            record.rank == rank and record.attempt == self.attempt()
            for record in records.read(records.folders(self.directory), but=self.before)
        )
        if ended or told or failure.exitcode == 0:
            return
        records.write(_lost(rank, failure, self.attempt()), records.folders(self.directory))

    def _stop_workers(self, worker_group: Any) -> None:
        if self.heart is not None:
            self.heart.stop()
            self.heart = None
        super()._stop_workers(worker_group)


def _lost(rank: int, failure: Any, attempt: int) -> records.Record:
    if failure.exitcode < 0:
        how = f"rank {rank} on {records.host()} was killed by signal {-failure.exitcode} ({failure.signal_name()})"
        why = "from outside; a kernel that is out of memory kills so too: dmesg | grep -i 'out of memory'"
    else:
        how = f"rank {rank} on {records.host()} ended with {failure.exitcode} and no word"
        why = "a library may have ended the process; its last words are in launch/logs of the run directory"
    problem = Problem("rank-lost", how, why=why)
    return records.Record("killed", 5, (problem,), rank, attempt, records.host(), time.time())


def _directory(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("ftune.training") + 1])


def main() -> int:
    """Start the ranks of this node and see them through; return 0 where all of them ended well, else 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = STOP.name
    logging.disable(logging.CRITICAL)  # torchrun's own words; each of its loggers sets its own level
    arguments = parse_args(sys.argv[1:])
    arguments.signals_to_handle = STOP.name
    directory = _directory(sys.argv)
    try:
        return _run(directory, arguments)
    except SignalException:
        return 1
    except RendezvousError as error:  # before the ranks were started
        what = f"the nodes of this launch did not meet: {socket.gethostname()} waited in vain"
        why = f"one has not been started, or cannot be reached ({type(error).__name__})"
        fix = (
            "start all of them, each with its own --node-rank, and let the port through; or wait longer: --join-timeout"
        )
        problem = Problem("node-unreachable", what, why=why, fix=fix)
        records.write(
            records.Record("lost-node", 3, (problem,), None, 10**6, records.host(), time.time()),
            records.folders(directory),
        )
        return 1


def _run(directory: Path, arguments: Any) -> int:
    config, command, words = config_from_args(arguments)
    meeting = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(words),
        rdzv_handler=registry.get_rendezvous_handler(meeting),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
    )
    agent = Agent(
        directory,
        config.rdzv_endpoint,
        spec,
        config.logs_specs,
        exit_barrier_timeout=_PARTING_SECONDS,
        shutdown_timeout=config.shutdown_timeout,
    )
    try:
        result = agent.run()
    except RendezvousError as error:
        if agent.heart is None:  # the ranks had been ended, to be started anew
            raise
        if not agent.heart.ended:
            agent.heart.lost_first_node(str(error))
        return 1
    finally:
        if agent.heart is not None:
            agent.heart.stop()
    # Closing waits for a first node that may be gone; this node has nothing to say to it any more.
    threading.Thread(target=spec.rdzv_handler.shutdown, daemon=True).start()
    return 1 if result.is_failed() else 0


if __name__ == "__main__":
    life.end(main())
