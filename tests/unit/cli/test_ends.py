"""How a command ends that was interrupted, or met what is ours to mend."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).parents[3]


def environment(temporary: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_ROOT), "TMPDIR": str(temporary), "PYTHONUTF8": "1"}


def test_an_interrupted_command_says_so(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)  # the command waits for what is never written
    command = [sys.executable, "-m", "ftune", "check", str(recipe)]
    process = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    writer = None
    try:
        while writer is None:
            assert process.poll() is None
            time.sleep(0.05)
            with contextlib.suppress(OSError):  # nobody reads yet
                writer = os.open(recipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.5)  # from opening to reading
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    os.close(writer)
    assert (process.returncode, said) == (130, "interrupted\n")


def test_a_bug_is_reported_whatever_the_arguments(tmp_path: Path) -> None:
    code = (
        "from ftune import cli\n"
        "@cli.app.command()\n"
        "def fail(word: str) -> None:\n"
        "    raise ValueError(word)\n"
        "cli.main()\n"
    )
    command = [os.fsencode(sys.executable), b"-c", os.fsencode(code), b"fail", b"\xff"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == b"ValueError: \\udcff"
    assert b"this is a bug in ftune" in done.stderr
    assert b"Traceback" not in done.stderr
    (report,) = tmp_path.glob("ftune-crash-*.txt")
    text = report.read_text(encoding="utf-8")
    assert "fail \\udcff\n" in text
    assert "Traceback" in text
