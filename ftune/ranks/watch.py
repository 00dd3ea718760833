"""The launcher's side: starts the agent of this node, passes on what the user asks for, tells the first cause.

It needs no torch, so that nothing of a broken process group can hold it up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.errors import Interrupted, Problem
from ftune.launch.plan import LaunchPlan
from ftune.ranks import life, place, records

_LOOK_SECONDS = 0.2
_SETTLE_SECONDS = 8.0
"""What ranks and agent have to end by themselves, once one of them has failed for good."""
_PART_SECONDS = 600.0
"""What the first rank has to write the result of a run that was stopped and saved, once the others have left."""
_END_SECONDS = 14.0
"""What an agent has to end its ranks once it is told to: more than it gives them."""
_STOP = signal.SIGUSR1

_OF_A_LAUNCH = (
    *place.OF_A_RANK,
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE"),
)


def forget_rank() -> None:
    """Take out of the environment what says that this process is a rank: a cluster may number its pods so."""
    for name in _OF_A_LAUNCH:
        os.environ.pop(name, None)


class Watch:
    """One node's launch, from the start of its agent to the end of its last process."""

    def __init__(self, directory: Path, plan: LaunchPlan, *, max_restarts: int) -> None:
        self.directory, self.plan = directory, plan
        self.max_restarts = max_restarts
        self.requests = 0
        """How often the user asked to stop."""
        self.shown = 0

    def run(self) -> records.Record | None:
        """Start the ranks and see them through; return what they failed of, None where they did not."""
        shared = records.folders(self.directory)[0]
        with tempfile.TemporaryDirectory(prefix="ftune-launch-") as own:
            here = Path(own)
            (here / "places").mkdir()
            self.folders = [shared, here / "records"]
            self.before = records.names(self.folders)
            environment = {**self.plan.environment, records.FOLDER: str(here / "records")}
            environment[place.PLACES] = str(here / "places")
            agent = subprocess.Popen(
                self.plan.argv,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is for this process alone
                preexec_fn=life.follow_parent_with_stop if sys.platform == "linux" else None,
            )
            with self._listening(agent, here / "places"):
                self._see_through(agent)
            return self._outcome(agent.returncode)

    @contextlib.contextmanager
    def _listening(self, agent: Any, places: Path) -> Iterator[None]:
        def asked(number: int, frame: Any) -> None:
            self.requests += 1
            place.ask(places)
            ranks = ranks_of(agent.pid)
            if self.requests > 1 or not ranks:
                _signal(agent.pid, _STOP)
            for process in ranks if self.requests == 1 else ():
                _signal(process, signal.SIGTERM)

        previous = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _see_through(self, agent: Any) -> None:
        """Wait for the agent; end it where it goes on after a failure that would only come again."""
        first: set[int] = set()
        told: float | None = None
        since: float | None = None
        while agent.poll() is None:
            time.sleep(_LOOK_SECONDS)
            found = records.read(self.folders, but=self.before)
            self._show_restarts(found)
            now = time.monotonic()
            processes = set(ranks_of(agent.pid))
            first = first if self.requests else processes
            # Once asked to stop nothing is started again.
            if since is None and (self._final(found) or (self.requests and processes - first)):
                since = now
            parting = bool(found) and all(record.kind == "saved" for record in found)
            if told is None and since is not None and now - since > (_PART_SECONDS if parting else _SETTLE_SECONDS):
                _signal(agent.pid, _STOP)
                told = now
            if told is not None and now - told > _END_SECONDS:
                for process in (*ranks_of(agent.pid), agent.pid):
                    _signal(process, signal.SIGKILL)

    def _final(self, found: list[records.Record]) -> bool:
        return any(record.kind not in records.RESTARTED or record.attempt >= self.max_restarts for record in found)

    def _show_restarts(self, found: list[records.Record]) -> None:
        """Say what was lost and that it goes on, once for each time."""
        lost = {record.attempt for record in found if record.kind in records.RESTARTED and record.kind != "lost-peer"}
        for attempt in sorted(lost):
            if attempt >= self.shown and attempt < self.max_restarts:
                self.shown = attempt + 1
                cause = records.first_cause([record for record in found if record.attempt == attempt])
                if cause is not None:
                    said = f"{cause.problems[0].what}; starting again from the last checkpoint"
                    print(f"{said} ({attempt + 1} of {self.max_restarts})", file=sys.stderr, flush=True)

    def _outcome(self, status: int) -> records.Record | None:
        found = records.read(self.folders, but=self.before)
        stopped = [record for record in found if record.kind in records.STOPPED]
        cause = records.first_cause(found)
        if self.requests and (cause is None or cause.kind in records.RESTARTED):
            # Those that were still starting died of the signal itself.
            cause = stopped[0] if stopped else _stopped_at_once(self.directory)
        elif status == 0 and (cause is None or cause.kind in records.RESTARTED):
            return None
        elif cause is None:
            cause = _agent_died(status, self.directory)
        if (self.directory / rundir.RUN).is_file():
            _write_result(self.directory, cause)
        return cause


def ranks_of(agent: int) -> list[int]:
    """Return the process ids of the ranks that an agent has running."""
    import psutil

    try:
        children = psutil.Process(agent).children()
    except psutil.Error:
        return []
    found = []
    for child in children:
        with contextlib.suppress(psutil.Error):
            if "ftune.training" in child.cmdline():
                found.append(child.pid)
    return found


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(process, number)


def _stopped_at_once(directory: Path) -> records.Record:
    fix = f"go on with: ftune resume {directory}"
    problem = Problem("interrupted", "stopped at once, without saving", fix=fix)
    return records.of_this_process("interrupted", Interrupted.exit_code, [problem])


def _agent_died(status: int, directory: Path) -> records.Record:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
    what = f"the agent that watches the ranks on {records.host()} {how}, and its ranks with it"
    why = f"what they said last is in {directory / rundir.LAUNCH / 'logs'}"
    return records.of_this_process("killed", 5, [Problem("rank-lost", what, why=why)])


def _write_result(directory: Path, cause: records.Record) -> None:
    """Leave the first cause in `result.json`; what a rank wrote there may be a consequence of it."""
    import json

    stopped = cause.kind in records.STOPPED
    if stopped and rundir.status(directory) == "interrupted":
        return
    status = "interrupted" if stopped else "failed"
    message = str(cause.error()) if cause.problems else (cause.traceback.strip().splitlines() or [""])[-1]
    values = {"status": status, "error": type(cause.error()).__name__, "message": message}
    with contextlib.suppress(OSError):
        rundir.write_text(directory / rundir.RESULT, json.dumps(values, indent=2) + "\n")
