"""Who hangs: judged from what each rank's process does, as its node sees it from outside, and from where it says it is.

A rank that waits for others is idle, and so is one that never comes. A rank that writes a large checkpoint takes long,
and is not idle. So nobody is judged by the time a step takes, but by having done nothing at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ftune.ranks import place

_IDLE_SHARE = 0.02
"""Of a core: the threads that watch take less, and the slowest work takes more."""
_IDLE_BYTES = 64 * 1024
_FRESH_SECONDS = 3 * place.INTERVAL_SECONDS


@dataclass(frozen=True)
class Sample:
    """What one rank does."""

    rank: int
    host: str
    idle_seconds: float
    """How long its process has neither computed, read nor written."""
    waits: bool
    """Whether it says that it is where ranks wait for each other, and is not stopped there."""
    stopped: bool
    """Whether it is stopped (SIGSTOP, a debugger)."""
    where: str


@dataclass
class _Seen:
    cpu_seconds: float
    moved_bytes: int
    at: float
    busy_at: float


@dataclass
class Observer:
    """Looks at the ranks of this node again and again."""

    host: str
    places: Path
    _seen: dict[int, _Seen] = field(default_factory=dict)

    def look(self, processes: Iterable[int]) -> list[Sample]:
        """Return a sample of each rank that has said which rank it is, by process id."""
        found = []
        for process in processes:
            said = place.read(self.places, process)
            idle = self._idle_seconds(process)
            if said is None or idle is None:
                continue
            fresh = time.monotonic() - float(str(said["time"])) < _FRESH_SECONDS
            stopped = _state(process) in "Tt"
            waits = bool(said["waits"]) and not stopped
            where = str(said["where"]) + ("" if fresh or stopped else ", when last heard of")
            found.append(Sample(int(str(said["rank"])), self.host, idle, waits, stopped, where))
        return found

    def _idle_seconds(self, process: int) -> float | None:
        import psutil

        now = time.monotonic()
        try:
            known = psutil.Process(process)
            times = known.cpu_times()
            counted = known.io_counters()
        except (psutil.Error, OSError):
            return None
        cpu, moved = times.user + times.system, counted.read_chars + counted.write_chars
        before = self._seen.get(process)
        if before is None:
            self._seen[process] = _Seen(cpu, moved, now, now)
            return 0.0
        seconds = max(now - before.at, 1e-3)
        # Ready to run or waiting for the disk is not idle, however little it gets of either.
        busy = (cpu - before.cpu_seconds) / seconds > _IDLE_SHARE or moved - before.moved_bytes > _IDLE_BYTES
        busy = busy or _state(process) in "RD"
        self._seen[process] = _Seen(cpu, moved, now, now if busy else before.busy_at)
        return now - self._seen[process].busy_at


def _state(process: int) -> str:
    """Return the state of a process's main thread as Linux letters it; a dead one's is X."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "X"
    return text.rpartition(")")[2].split()[0]


def hung(samples: Mapping[int, Sample], ranks: int, limit_seconds: float) -> list[Sample]:
    """Return the ranks that did not come to where others wait; all of them where each waits for the others.

    Nothing is said before every rank was heard of.
    """
    if limit_seconds <= 0 or len(samples) < ranks or ranks < 2:
        return []
    still = [sample for sample in samples.values() if sample.idle_seconds >= limit_seconds]
    missing = [sample for sample in still if not sample.waits]
    if missing and any(sample.waits for sample in samples.values()):
        return missing
    return still if len(still) == ranks and all(sample.waits for sample in still) else []
