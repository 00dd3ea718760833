"""Names of the files in a run directory; nothing else in ftune spells them."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECIPE = "recipe.yaml"
OVERRIDES = "overrides.yaml"
RUN = "run.json"
ENVIRONMENT = "environment.txt"
METRICS = "metrics.jsonl"
RESULT = "result.json"
SAMPLES = "samples.jsonl"
CHECKPOINTS = "checkpoints"
MODEL = "model"
TEMPLATE_SAMPLE = "ftune_template.json"
BASE_FINGERPRINT = "ftune_base.json"
REPORT = "report.html"
CODES = "codes.safetensors"
CODES_LOCK = ".codes.lock"
ZEROTH_ORDER = "zeroth_order.log"
ZEROTH_ORDER_CHOSEN = "zeroth_order.safetensors"
LOCK = ".lock"
LAUNCH = "launch"
OWN = frozenset(
    (
        *(RECIPE, OVERRIDES, RUN, ENVIRONMENT, METRICS, RESULT, SAMPLES, CHECKPOINTS, MODEL, REPORT, LOCK),
        *(ZEROTH_ORDER, ZEROTH_ORDER_CHOSEN, CODES, CODES_LOCK, LAUNCH),
    )
)
"""Everything that ftune itself writes into a run directory."""

PARTIAL_SUFFIX = ".partial"
"""What is being written carries this until it is complete; leftovers of a killed run may be deleted."""


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step}"


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run directory, oldest first."""
    found = []
    for path in (directory / CHECKPOINTS).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and path.is_dir():
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def partials(directory: Path) -> list[Path]:
    """Return what a killed run was in the middle of writing; a file of another name is a user's own."""
    named = [directory / (name + PARTIAL_SUFFIX) for name in sorted(OWN)]
    saved = sorted((directory / CHECKPOINTS).glob("checkpoint-[0-9]*" + PARTIAL_SUFFIX))
    return [path for path in (*named, *saved) if path.exists()]


def strangers(directory: Path) -> list[str]:
    """Return the names of what ftune did not write into a run directory that has no checkpoint."""
    unfinished = {path.name for path in partials(directory)}
    found = [path.name for path in directory.iterdir() if path.name not in OWN | unfinished]
    inside = [path.name for path in (directory / CHECKPOINTS).glob("*") if path.name not in unfinished]
    return sorted([*found, *(f"{CHECKPOINTS}/{name}" for name in inside)])


def status(directory: Path) -> str:
    """Return how a run ended; `unknown` where it did not yet, or nothing says."""
    try:
        return str(json.loads((directory / RESULT).read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("w", encoding="utf-8", newline="") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a log; the last line of a killed run may be half a line, and is left out."""
    rows = []
    # Bytes, since only a newline ends a row: text may hold U+2028, and a killed run may leave half a letter.
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line.decode("utf-8")))
    return [row for row in rows if isinstance(row, dict)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a log by these rows."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sync_directory(path: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Yield a partial directory to fill; it takes its final name only when everything in it is on the disk.

    An existing directory of the final name is replaced. On an error the partial one is removed.
    """
    import shutil

    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _settle(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync_directory(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Do the same outside a run directory, where nothing is ours: no file is replaced and no name is taken.

    Raises OSError where something came to be in `final` meanwhile.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ftune-", suffix=PARTIAL_SUFFIX, dir=final.parent) as own:
        partial = Path(own) / "whole"  # made by mkdir, so that its rights are the usual ones
        partial.mkdir()
        yield partial
        _settle(partial)
        partial.rename(final)  # an empty directory gives way
        sync_directory(final.parent)


def _settle(folder: Path) -> None:
    """Bring everything in a folder to the disk, readable for those whom the folder lets in.

    Safetensors writes files that only their owner may read, whatever the umask; the folder was made as it says.
    """
    wanted = folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            mode = path.stat().st_mode
            if mode | wanted != mode:
                path.chmod(stat.S_IMODE(mode | wanted))
            with path.open("rb") as written:
                os.fsync(written.fileno())
        else:
            sync_directory(path)
    sync_directory(folder)
