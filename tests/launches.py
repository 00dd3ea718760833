"""Launches for tests: real processes, started as a user starts them, and what becomes of each of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 240
"""For what takes seconds on a free machine."""


class Launch:
    """A launch that runs, and all processes that ever belonged to it."""

    def __init__(self, words: Sequence[str], output: Path, *, before: Sequence[str] = (), **environment: str) -> None:
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "ftune", *words],
                cwd=ROOT,
                env=settings,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.seen: dict[int, psutil.Process] = {}

    def look(self) -> list[psutil.Process]:
        """Return the processes that there are now, and remember them."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            found = []
        self.seen |= {process.pid: process for process in found}
        return found

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank."""
        for process in self.look():
            try:
                words, settings = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if "ftune.training" in words and settings.get("RANK") == str(number):
                return process
        raise AssertionError(f"no rank {number}:\n{self.text()}")

    def agent(self) -> psutil.Process:
        """Return the process that watches the ranks."""
        return next(process for process in self.look() if "ftune.ranks.agent" in process.cmdline())

    def wait_for_step(self, run: Path, step: int) -> None:
        """Wait until a run has logged a step."""
        end = time.monotonic() + PATIENCE_SECONDS
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"loss"') < step:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            self.look()
            time.sleep(0.1)

    def end(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Return the exit code; fails where it takes longer than so many seconds."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, self.text()
            self.look()
            time.sleep(0.1)
        return self.process.returncode

    def text(self) -> str:
        """Return what was printed."""
        return self.output.read_text(errors="replace")

    def left_over(self, seconds: float = 10.0) -> list[psutil.Process]:
        """Return the processes that are still there so many seconds later."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=seconds)
        return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def clear(self) -> None:
        """End whatever is left of a test that failed."""
        for process in [*self.left_over(0), *([self.process] if self.process.poll() is None else [])]:
            process.kill()
        self.process.wait()


def written(folder: Path, values: dict[str, Any]) -> Path:
    """Write a recipe into a folder."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
