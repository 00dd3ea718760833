"""Where ftune keeps what it made once and may need again; everything in it can be deleted at any time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from ftune.digest import sha256_of
from ftune.errors import MachineError, Problem
from ftune.rundir import PARTIAL_SUFFIX


def cache_directory() -> Path:
    """Return the cache folder: FTUNE_CACHE, or `~/.cache/ftune`."""
    chosen = os.environ.get("FTUNE_CACHE") or "~/.cache/ftune"
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:  # no such user, or no home
        what, fix = f"the cache folder `{chosen}` cannot be found", "set FTUNE_CACHE to a folder you can write to"
        raise MachineError(Problem(rule="cache", what=what, why=str(error), fix=fix)) from None


_SETTLED_SECONDS = 1.0
"""A file that changed later than this ago may change again without a sign: clocks of file systems tick coarsely."""


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file; remembered by path, size and times, as a 10 GB file takes ten seconds to read.

    The time of the last change of its status is among them: no program can set that one back.
    """
    status = path.stat()
    stamp = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    note = cache_directory() / "hashes" / (hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24] + ".json")
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = sha256_of(path)
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _SETTLED_SECONDS * 1e9:
        return digest
    with contextlib.suppress(OSError):  # without a note it is read again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two processes may hash the same file at once.
        with tempfile.NamedTemporaryFile("w", dir=note.parent, suffix=PARTIAL_SUFFIX, delete=False) as own:
            json.dump({"stamp": stamp, "sha256": digest}, own)
        Path(own.name).replace(note)
    return digest
