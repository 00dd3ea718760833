"""Processes that end with the one that started them, and what is left of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1


def follow_parent(number: int = signal.SIGKILL) -> None:
    """Have this process sent a signal when its parent dies, however that happens: no rank outlives its launch.

    Linux alone can do so; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(number), 0, 0, 0)


def follow_parent_with_stop() -> None:
    """Have this process end its own ranks when its parent dies."""
    follow_parent(signal.SIGUSR1)


def end(status: int) -> None:
    """Leave at once, workers of loaders ended first: the threads of a broken process group may never return."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
