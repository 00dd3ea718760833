"""A process that has imported everything a trace needs, and forks for each: what takes longest is done once.

    with kept_tracer():
        trace(...)

It only ever imports: each trace runs in a fork of it, which ends with the trace.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_TRACED = "ftune.memory.traced"
LIMIT_SECONDS = 600.0
"""For one trace; most take seconds, also of large models, of which few layers are traced."""


class TookTooLong(Exception):  # noqa: N818 (what happened, not what is wrong)
    """A trace was ended because its time was over."""


class _Tracer:
    """The process, started at the first trace."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, asked: str, answer: Path, seconds: float) -> tuple[int, str]:
        """Trace what is asked into a file; return the exit code and what was said."""
        if self._process is None:
            self._process = subprocess.Popen(
                _command(__name__), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(), text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([asked, str(answer), seconds]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return 1, "the process that traces ended"
        code, said = json.loads(line)
        if code == -signal.SIGALRM:
            raise TookTooLong
        return code, said

    def end(self) -> None:
        if self._process is not None:
            self._process.communicate()


_kept: list[_Tracer] = []
_limits = [LIMIT_SECONDS]
"""Of the traces inside each `kept_tracer`; the last one holds."""


@contextlib.contextmanager
def kept_tracer(limit_seconds: float | None = None) -> Iterator[None]:
    """Let all traces inside share the time of imports, where the system can fork, and each take so long at the most."""
    _limits.append(_limits[-1] if limit_seconds is None else limit_seconds)
    tracer = _Tracer() if hasattr(os, "fork") and not _kept else None
    try:
        if tracer is not None:
            _kept.append(tracer)
        yield
    finally:
        _limits.pop()
        if tracer is not None:
            _kept.remove(tracer)
            tracer.end()


def limit_seconds() -> float:
    """Return how long a trace may take."""
    return _limits[-1]


def run_traced(asked: str, answer: Path) -> tuple[int, str]:
    """Run one trace, in a process of its own; return its exit code and what it said. Raises TookTooLong."""
    if _kept:
        return _kept[0].run(asked, answer, limit_seconds())
    command = [*_command(_TRACED), str(answer)]
    try:
        done = subprocess.run(
            command,
            input=asked,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_seconds(),
        )
    except subprocess.TimeoutExpired:
        raise TookTooLong from None
    return done.returncode, done.stderr


def _command(module: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", module]


def _environment() -> dict[str, str]:
    """Return the environment of one process, without a GPU, that is no rank of a launch."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Read what to trace line by line, and answer each with an exit code and what was said."""
    answers, sys.stdout = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        _import_all()
    for line in sys.stdin:
        print(json.dumps(_forked(*json.loads(line))), file=answers, flush=True)


def _import_all() -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    from ftune.memory import bits, cuda, numberless, skeleton, step, tracked, turns  # noqa: F401


def _forked(asked: str, answer: str, seconds: float) -> tuple[int, str]:
    """Trace in a fork, which ends when its time is over; return its exit code and the end of what it said."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            os.dup2(said.fileno(), 2)
            os.dup2(said.fileno(), 1)
            os._exit(_trace(asked, answer))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read()[-4000:]


def _trace(asked: str, answer: str) -> int:
    import traceback

    from ftune.memory import traced

    try:
        traced.answer(json.loads(asked), Path(answer))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    main()
