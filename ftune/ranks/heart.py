"""What the nodes tell each other of their ranks while they train, and what is done about one that hangs or is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from ftune.errors import Problem
from ftune.ranks import network, place, records
from ftune.ranks.pulse import Observer, Sample, hung

_FIX = "if it was slow and not hung, allow more: --hang-timeout SECONDS (0 ends no run for it)"


class Heart:
    """A thread that looks at this node's ranks, tells the other nodes, and ends the ranks once nothing moves."""

    def __init__(
        self,
        group: Any,
        processes: Sequence[int],
        folders: Sequence[Path],
        *,
        meeting: str,
        attempt: int,
        limit_seconds: float,
    ) -> None:
        """Take torchrun's group of this node's ranks; `meeting` is HOST:PORT of the store where the agents met."""
        self.node, self.nodes = int(group.group_rank), int(group.group_world_size)
        self.ranks = int(group.workers[0].world_size)
        self.processes, self.folders = list(processes), list(folders)
        self.meeting = meeting
        self.round, self.hosts = self._agree(group.store)
        self.attempt, self.limit_seconds = attempt, limit_seconds
        self.ended = False
        """Whether the ranks were ended from here."""
        self._stopping = threading.Event()
        self._observer = Observer(records.host(), Path(os.environ.get(place.PLACES, ".")))
        self._samples: dict[int, list[Sample]] = {}
        """By node, as it looked last."""
        self._heard = dict.fromkeys(range(self.nodes), time.monotonic())
        self._beats: dict[int, int] = {}

    def _agree(self, store: Any) -> tuple[str, list[str]]:
        """Return a name for this start of the ranks, whose agents may count restarts otherwise, and all nodes' names.

        torchrun numbers nodes in an order of its own.
        """
        if self.nodes == 1:
            return "", [records.host()]
        if self.node == 0:
            store.set("ftune/round", str(time.time_ns()))
        store.set(f"ftune/host/{self.node}", records.host())
        return str(store.get("ftune/round"), "ascii"), [
            str(store.get(f"ftune/host/{node}"), "utf-8") for node in range(self.nodes)
        ]

    def begin(self) -> None:
        """Start looking; and telling, where there are other nodes: that can block when one of them is gone."""
        threading.Thread(target=self._watch, name="ftune-heart", daemon=True).start()
        if self.nodes > 1:
            threading.Thread(target=self._exchange, name="ftune-exchange", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()

    def lost_first_node(self, why: str) -> None:
        """End this node's ranks, since the agent could not ask the first node whether others have come."""
        what = f"the node where the others meet cannot be reached any more from {records.host()}"
        self._end("lost-node", Problem("node-lost", what, why=why.strip()[:300], fix=_FIX))

    def _watch(self) -> None:
        while not self._stopping.wait(place.INTERVAL_SECONDS):
            self._samples[self.node] = self._observer.look(self.processes)
            found = {sample.rank: sample for samples in list(self._samples.values()) for sample in samples}
            if problem := self._silent_node():
                self._end("lost-node", problem)
            elif missing := hung(found, self.ranks, self.limit_seconds):
                self._end("hung", self._hung(missing))

    def _silent_node(self) -> Problem | None:
        now = time.monotonic()
        silent = [node for node, at in self._heard.items() if node != self.node and now - at > self.limit_seconds]
        if not silent or self._stopping.is_set():
            return None
        # Whoever is cut off from the store hears of nobody.
        alone = len(silent) == self.nodes - 1 > 1
        who = "no other node can" if alone else f"{', '.join(self.hosts[node] for node in silent)} cannot"
        what = f"{who} be reached any more from {records.host()}"
        why = f"nothing was heard of it for {self.limit_seconds:.0f} s: it is down, or the network is"
        return Problem("node-lost", what, why=why, fix=_FIX)

    def _hung(self, missing: list[Sample]) -> Problem:
        if len(missing) == self.ranks:
            what = "all ranks wait for each other, and nothing moves"
        else:
            who = ", ".join(f"rank {sample.rank} on {sample.host}" for sample in missing)
            what = f"{who} did not come to where the other ranks wait"
        places = "; ".join(
            f"rank {sample.rank} is {'stopped ' if sample.stopped else ''}in {sample.where}" for sample in missing[:4]
        )
        why = f"nothing was computed, read or written for {self.limit_seconds:.0f} s: {places}"
        return Problem("rank-hung", what, why=why, fix=_FIX)

    def _end(self, kind: records.Kind, problem: Problem) -> None:
        """Write it down and end this node's ranks; the agent sees them end, and starts them anew or gives up."""
        self._stopping.set()
        self.ended = True
        record = records.Record(kind, 5, (problem,), None, self.attempt, records.host(), time.time())
        records.write(record, self.folders)
        for process in self.processes:
            with contextlib.suppress(OSError):
                os.killpg(process, signal.SIGKILL)

    def _exchange(self) -> None:
        """Tell and hear of the others, through a connection of its own to the store where the agents met."""
        from torch.distributed import TCPStore

        host, port = network.split(self.meeting)
        beat, store = 0, None
        while not self._stopping.wait(place.INTERVAL_SECONDS):
            beat += 1
            with contextlib.suppress(Exception):  # a store that does not answer is what silence is judged by
                store = store or TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
                store.set(self._key(self.node), json.dumps([beat, self._looked()]))
                for node in range(self.nodes):
                    if node != self.node:
                        self._hear(store, node)

    def _looked(self) -> list[dict[str, Any]]:
        return [asdict(sample) for sample in self._samples.get(self.node, ())]

    def _key(self, node: int) -> str:
        return f"ftune/pulse/{self.round}/{node}"

    def _hear(self, store: Any, node: int) -> None:
        store.wait([self._key(node)], timedelta(seconds=place.INTERVAL_SECONDS))
        beat, samples = json.loads(store.get(self._key(node)))
        if self._beats.get(node) != beat:
            self._beats[node] = beat
            self._heard[node] = time.monotonic()
            self._samples[node] = [Sample(**values) for values in samples]
