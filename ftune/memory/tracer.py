"""A process that has imported everything a trace needs, and forks for each: what takes longest is done once.

    with kept_tracer():
        trace(...)

It only ever imports: each trace runs in a fork of it, which ends with the trace.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_TRACED = "ftune.memory.traced"


class _Tracer:
    """The process, started at the first trace."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, asked: str, answer: Path) -> tuple[int, str]:
        """Trace what is asked into a file; return the exit code and what was said."""
        if self._process is None:
            self._process = subprocess.Popen(
                _command(__name__), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(), text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([asked, str(answer)]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return 1, "the process that traces ended"
        code, said = json.loads(line)
        return code, said

    def end(self) -> None:
        if self._process is not None:
            self._process.communicate()


_kept: list[_Tracer] = []


@contextlib.contextmanager
def kept_tracer() -> Iterator[None]:
    """Let all traces inside share the time of imports, where the system can fork."""
    if not hasattr(os, "fork") or _kept:
        yield
        return
    tracer = _Tracer()
    _kept.append(tracer)
    try:
        yield
    finally:
        _kept.remove(tracer)
        tracer.end()


def run_traced(asked: str, answer: Path) -> tuple[int, str]:
    """Run one trace, in a process of its own; return its exit code and what it said."""
    if _kept:
        return _kept[0].run(asked, answer)
    command = [*_command(_TRACED), str(answer)]
    done = subprocess.run(command, input=asked, env=_environment(), capture_output=True, text=True, check=False)
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
        asked, answer = json.loads(line)
        print(json.dumps(_forked(asked, answer)), file=answers, flush=True)


def _import_all() -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    from ftune.memory import bits, cuda, numberless, skeleton, step, tracked, turns  # noqa: F401


def _forked(asked: str, answer: str) -> tuple[int, str]:
    """Trace in a fork; return its exit code and the end of what it said."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
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
