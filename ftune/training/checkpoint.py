"""Checkpoints: complete or absent, read back after writing, never trusted without their manifest."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.digest import sha256_of
from ftune.errors import MachineError, Problem, RunError
from ftune.recipe.schema import Training
from ftune.units import format_bytes

MANIFEST = "manifest.json"
STATE = "ftune_state.json"


def seal(folder: Path) -> None:
    """Write the manifest of a finished checkpoint folder: every file's size and SHA-256, as read back."""
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    rundir.write_text(folder / MANIFEST, json.dumps(entries, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None; reads all of it (about 1 s for 1 GB)."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "its manifest cannot be read"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if sha256_of(path) != entry["sha256"]:
            return f"{name} is not what was written"
    return None


def latest(directory: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest undamaged checkpoint of a run, and the damaged ones that are newer."""
    damaged = []
    for path in reversed(rundir.checkpoints(directory)):
        why = damage(path)
        if why is None:
            return path, damaged
        damaged.append((path, why))
    return None, damaged


def remove_partial(directory: Path) -> None:
    """Delete what a killed run was in the middle of writing."""
    for path in rundir.partials(directory):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def prune(directory: Path, *, keep: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints beyond `keep`; the best one stays besides."""
    if keep is None:
        return
    for path in rundir.checkpoints(directory)[:-keep]:
        if best is None or path.name != best.name:
            shutil.rmtree(path)


def planned_saves(training: Training, steps: int) -> int:
    """Return how many checkpoints a run of so many steps writes."""
    if training.save_strategy == "no":
        return 0
    if training.save_strategy == "epoch":
        return math.ceil(training.num_train_epochs)
    every = training.save_steps if training.save_steps >= 1 else max(1, steps * training.save_steps)
    return math.ceil(steps / every)


def most_at_once(keep: int | None, saves: int) -> int:
    """Return how many checkpoints there are at most: while one is written the old ones stay, and so does the best."""
    return saves if keep is None else min(saves, keep + 2)


def room_needed(*, checkpoint_bytes: int, model_bytes: int, keep: int | None, saves: int) -> int:
    """Return the bytes of disk that a run takes at most: its checkpoints and its result."""
    return most_at_once(keep, saves) * checkpoint_bytes + model_bytes


def check_room(directory: Path, *, checkpoint_bytes: int, model_bytes: int, keep: int | None, saves: int) -> None:
    """Raise MachineError where the disk has no room for what the run will write."""
    count = most_at_once(keep, saves)
    needed = room_needed(checkpoint_bytes=checkpoint_bytes, model_bytes=model_bytes, keep=keep, saves=saves)
    free = shutil.disk_usage(directory).free
    if free >= needed:
        return
    raise MachineError(
        Problem(
            "disk-room",
            f"the disk of {directory} has {format_bytes(free)} free, and the run needs {format_bytes(needed)}",
            why=f"{count} checkpoints of {format_bytes(checkpoint_bytes)} and a model of {format_bytes(model_bytes)}",
            fix="free the disk, choose another training.output_dir, lower save_total_limit, or set save_strategy: no",
        )
    )


def out_of_room(error: BaseException) -> bool:
    """Return whether an error means that the disk is full, whoever raises it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors and PyTorch wrap the system's error in their own classes and keep only its words.
    words = (
        "No space left",
        "StorageFull",
        "os error 28",
        "os error 27",  # a limit on the size of files
        "os error 122",  # a quota
        "code: 28",
        "PytorchStreamWriter failed writing",
        "enforce fail",
    )
    return any(word in str(error) for word in words)


def saving_failed(path: Path, error: BaseException) -> RunError:
    """Return the problem of a checkpoint or model that could not be written."""
    run = path.parent.parent if path.parent.name == rundir.CHECKPOINTS else path.parent
    kept = rundir.checkpoints(run)
    last = f"{kept[-1].name} is whole" if kept else "no earlier checkpoint exists"
    free = format_bytes(shutil.disk_usage(path.parent).free)
    return RunError(
        Problem(
            "disk-full",
            f"could not write {path.name}: {free} left on the disk",
            why=f"{str(error).splitlines()[0][:200]}; nothing half-written was left, and {last}",
            fix=f"free the disk, then: ftune resume {run}",
        )
    )


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of tensors that share no storage."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
