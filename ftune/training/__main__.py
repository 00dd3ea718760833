"""One rank of a launch: `python -m ftune.training RUN_DIR`, as torchrun's agent starts it.

It reads run.json and nothing else of what the user wrote, and goes on from the last checkpoint where there is one: so a
first start, a start after a lost rank, and a job that was requeued are the same. How it ends is written down for the
launcher to tell; an interrupt that was saved counts as an end, or the agent would start the rank again.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from ftune.errors import FtuneError, Interrupted, Problem
from ftune.ranks import life, place, records


def main(arguments: list[str]) -> NoReturn:
    """Train one rank, and leave with what became of it."""
    directory = Path(arguments[0])
    life.follow_parent()
    _listen_to(_at_once)
    place.tell()
    try:
        _train(directory, only_preflight="--preflight" in arguments, plain="--plain" in arguments)
    except BaseException as error:
        _listen_to(signal.SIG_IGN)  # the agent ends the others as soon as it sees one fail
        record = _record(error, directory)
        records.write(record, records.folders(directory))
        _leave(0 if record.kind in records.STOPPED else record.exit_code, saved=record.kind == "saved")
    _leave(0, saved=True)


def _leave(status: int, *, saved: bool) -> NoReturn:
    """End this process: as any other, or at once where a process group may be broken, whose threads never return."""
    if not saved:
        life.end(status)
    import torch.distributed as distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    sys.exit(status)


def _listen_to(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handler)


def _at_once(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _train(directory: Path, *, only_preflight: bool, plain: bool) -> None:
    from ftune.machine import probe
    from ftune.models.quiet import hush_imports
    from ftune.ranks import preflight

    hush_imports()
    main, machine = os.environ.get("RANK", "0") == "0", probe()
    found = preflight.check(directory, machine, lambda problem: print(f"{problem.severity}: {problem}", flush=True))
    if main:
        print(found, flush=True)
    if only_preflight:
        return
    _be_alone_if_alone()
    from ftune.training import resuming, run

    continued = resuming.go_on(directory, machine)
    if main:
        for note in continued.notes:
            print(note, flush=True)
    run.train(continued.spec, plain=plain, checkpoint=continued.checkpoint, launched=True)


def _be_alone_if_alone() -> None:
    """Forget the launch where it has one rank: Hugging Face would make a process group of one."""
    if os.environ.get("WORLD_SIZE") == "1":
        for name in place.OF_A_RANK:
            os.environ.pop(name, None)


def _record(error: BaseException, directory: Path) -> records.Record:
    if isinstance(error, KeyboardInterrupt):
        fix = f"go on with: ftune resume {directory}"
        error, cause = Interrupted(Problem("interrupted", "stopped at once, without saving", fix=fix)), error
        error.__cause__ = cause
    if isinstance(error, FtuneError):
        record = records.record_of(error)
        if record.kind != "interrupted" or place.asked():
            return record
    text = "".join(traceback.format_exception(error))
    if isinstance(error, Interrupted) or _lost_a_peer(error):
        what = f"rank {os.environ.get('RANK', '0')} on {records.host()} lost the other ranks"
        fix = f"go on with: ftune resume {directory}"
        return records.of_this_process(
            "lost-peer", 5, [Problem("peer-lost", what, why=_last_line(error), fix=fix)], text
        )
    return records.of_this_process("crash", 1, [], text)


def _lost_a_peer(error: BaseException) -> bool:
    """Return whether an error is that of a process group whose other end is gone; gloo has no class of its own."""
    import torch.distributed as distributed

    if isinstance(error, distributed.DistError):
        return True
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


if __name__ == "__main__":
    main(sys.argv[1:])
