"""Where each rank of a node is, told by the rank itself: a thread that looks at the main thread every other second."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType

OF_A_RANK = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables that say that a process is a rank, and where the others are."""
PLACES = "FTUNE_PLACES"
"""Names the folder in which the ranks of a node say where they are."""
INTERVAL_SECONDS = 2.0
_ASKED = "asked"
"""A file beside the places, there once the user has asked to stop."""

_WAITING_FILES = ("/torch/distributed/", "/deepspeed/comm/")
_WAITING_FUNCTIONS = ("_engine_run_backward",)
"""DDP adds up gradients inside of backward, without a Python frame of its own."""


def tell() -> None:
    """Begin to tell where this process's main thread is, if anybody asked."""
    folder = os.environ.get(PLACES)
    if folder:
        path = Path(folder) / f"{os.getpid()}.json"
        threading.Thread(target=_tell, args=(path,), name="ftune-place", daemon=True).start()


def _tell(path: Path) -> None:
    main, rank = threading.main_thread().ident, int(os.environ.get("RANK", "0"))
    while True:
        frame = sys._current_frames().get(main or 0)
        if frame is not None:
            waits, where = looked_at(frame)
            partial = path.with_suffix(".partial")
            with contextlib.suppress(OSError):
                text = json.dumps({"rank": rank, "time": time.monotonic(), "waits": waits, "where": where})
                partial.write_text(text, encoding="utf-8")
                partial.replace(path)
        del frame
        time.sleep(INTERVAL_SECONDS)


def looked_at(frame: FrameType) -> tuple[bool, str]:
    """Return whether a stack is at a place where ranks wait for each other, and its innermost line."""
    where = f"{frame.f_code.co_name} ({_short(frame.f_code.co_filename)}:{frame.f_lineno})"
    found: FrameType | None = frame
    while found is not None:
        code = found.f_code
        if code.co_name in _WAITING_FUNCTIONS or any(part in code.co_filename for part in _WAITING_FILES):
            return True, where
        found = found.f_back
    return False, where


def _short(name: str) -> str:
    return "/".join(name.split("/")[-2:])


def ask(folder: Path) -> None:
    """Have the ranks of this node know that it is the user who ends them."""
    with contextlib.suppress(OSError):
        (folder / _ASKED).touch()


def asked() -> bool:
    """Return whether the user ended this rank, rather than its agent after another one failed: both send SIGTERM.

    A batch system may signal every process at once, and the launcher comes to it a little later.
    """
    folder = os.environ.get(PLACES)
    for _ in range(10):
        if not folder or (Path(folder) / _ASKED).exists():
            return True
        time.sleep(0.1)
    return False


def read(folder: Path, process: int) -> dict[str, object] | None:
    """Return what a rank said last of where it is; None where it has not spoken yet."""
    try:
        found = json.loads((folder / f"{process}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
