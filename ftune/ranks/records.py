"""What a rank or an agent writes down of a failure, so that a launcher can tell which one came first."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ftune import rundir
from ftune.errors import DataError, FtuneError, Interrupted, MachineError, Place, Problem, RecipeError, RunError
from ftune.launch.plan import NODE

FOLDER = "FTUNE_RECORDS"
"""Names a folder of this node, for what cannot be written into a run directory whose disk is full."""
Kind = Literal["problem", "crash", "killed", "hung", "lost-node", "lost-peer", "interrupted", "saved"]
_CONSEQUENCES: dict[Kind, int] = {"interrupted": 1, "lost-peer": 2}
"""Who is ended after another one failed, or loses it, is never the first cause of what was noticed later."""
STOPPED: frozenset[Kind] = frozenset(("interrupted", "saved"))
"""At the user's request: at once, or after a step and saved."""
RESTARTED: frozenset[Kind] = frozenset(("killed", "hung", "lost-node", "lost-peer"))
"""After these an elastic run may go on from its last checkpoint; the others would come again."""

_ERRORS = {kind.exit_code: kind for kind in (RecipeError, MachineError, DataError, RunError, Interrupted)}


@dataclass(frozen=True)
class Record:
    """How one process of a launch ended."""

    kind: Kind
    exit_code: int
    problems: tuple[Problem, ...]
    rank: int | None = None
    """None for what a node's agent saw of no single rank."""
    attempt: int = 0
    """How often the ranks had been started anew before."""
    host: str = ""
    time: float = 0.0
    traceback: str = ""

    def error(self) -> FtuneError:
        """Return this end as the error that it was."""
        return _ERRORS.get(self.exit_code, RunError)(*self.problems)


def record_of(error: FtuneError) -> Record:
    """Return the record of an error that can be explained."""
    kind: Kind = "problem"
    if isinstance(error, Interrupted):  # of Python's own where there was no step to wait for
        kind = "interrupted" if isinstance(error.__cause__, KeyboardInterrupt) else "saved"
    return of_this_process(kind, error.exit_code, error.problems)


def of_this_process(kind: Kind, exit_code: int, problems: Sequence[Problem], traceback: str = "") -> Record:
    """Return a record of now and here; the rank is that of the environment."""
    rank, attempt = os.environ.get("RANK"), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    number = int(rank) if rank is not None else None
    return Record(kind, exit_code, tuple(problems), number, attempt, host(), time.time(), traceback)


def host() -> str:
    """Return what this node is called in messages: its name, and in a launch of several its number."""
    number = os.environ.get(NODE)
    return socket.gethostname() + (f" (node {number})" if number is not None else "")


def folders(directory: Path) -> list[Path]:
    """Return where records of a run lie: beside the run for all nodes to see, and on this node."""
    here = os.environ.get(FOLDER)
    return [directory / rundir.LAUNCH / "records", *([Path(here)] if here else [])]


def write(record: Record, places: Iterable[Path]) -> None:
    """Write a record into every folder that takes it: one of them may lie on a full disk."""
    name = f"{time.time_ns()}-{record.rank if record.rank is not None else 'agent'}-{os.getpid()}.json"
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            rundir.write_text(place / name, json.dumps(asdict(record), indent=1) + "\n")


def names(places: Iterable[Path]) -> frozenset[str]:
    """Return the names of the records that are there."""
    return frozenset(path.name for place in places if place.is_dir() for path in place.glob("*.json"))


def read(places: Iterable[Path], *, but: frozenset[str] = frozenset()) -> list[Record]:
    """Return the records that are there, but for those of before, oldest first."""
    found: dict[str, Record] = {}
    for place in places:
        for path in place.glob("*.json") if place.is_dir() else ():
            if path.name not in but and path.name not in found:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    found[path.name] = _parsed(json.loads(path.read_text(encoding="utf-8")))
    return sorted(found.values(), key=lambda record: record.time)


def first_cause(found: Sequence[Record]) -> Record | None:
    """Return what the last attempt failed of: the earliest record that is no mere consequence of another one."""
    if not found:
        return None
    last = max(record.attempt for record in found)
    of_it = [record for record in found if record.attempt == last]
    return min(of_it, key=lambda record: (_CONSEQUENCES.get(record.kind, 0), record.time))


def _parsed(values: dict[str, Any]) -> Record:
    problems = tuple(_problem(problem) for problem in values.pop("problems"))
    return Record(**{**values, "problems": problems})


def _problem(values: dict[str, Any]) -> Problem:
    where = values.pop("where")
    also = tuple((Place(**place), label) for place, label in values.pop("also"))
    return Problem(**values, where=Place(**where) if where else None, also=also)
