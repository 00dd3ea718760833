"""A run directory: made for a new run, reopened for one that goes on, held by one process at a time."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ftune import rundir
from ftune.errors import Problem, RunError
from ftune.recipe import overrides
from ftune.resolve import Decision, RunSpec
from ftune.training import checkpoint


def create(spec: RunSpec) -> None:
    """Make the run directory of a new run; raises RunError where another run, or anything else, is in it."""
    directory = Path(spec.recipe.training.output_dir)
    if directory.exists() and not directory.is_dir():
        raise RunError(_in_the_way(directory, "it is a file", "choose another training.output_dir"))
    if directory.is_dir() and any(entry.name != rundir.LOCK for entry in directory.iterdir()):
        _make_room(directory)
    try:
        (directory / rundir.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        rundir.write_text(directory / rundir.RECIPE, spec.recipe_text)
        if spec.overrides:
            rundir.write_text(directory / rundir.OVERRIDES, overrides.as_yaml(spec.overrides))
        rundir.write_text(directory / rundir.ENVIRONMENT, _environment())
        rundir.write_text(directory / rundir.RUN, spec.to_json())
    except OSError as error:
        fix = "choose a training.output_dir you can write to, on a disk with room"
        raise RunError(Problem("output-dir", f"cannot write to {directory}", why=str(error), fix=fix)) from None


def _make_room(directory: Path) -> None:
    """Clear what a run left that never took a step; refuse anything that holds work."""
    if not (directory / rundir.RUN).exists():
        raise RunError(_in_the_way(directory, "it holds other files", "choose a new training.output_dir"))
    with held(directory):
        if (
            rundir.checkpoints(directory)
            or (directory / rundir.METRICS).exists()
            or (directory / rundir.MODEL).exists()
        ):
            fix = f"go on with it: ftune resume {directory}; or start anew elsewhere: --set training.output_dir=..."
            raise RunError(_in_the_way(directory, "it holds another run", fix))
        _clear(directory)


def _clear(directory: Path) -> None:
    """Remove what ftune itself wrote, and nothing else: what a user put there is not ours to delete."""
    checkpoint.remove_partial(directory)
    strangers = [entry.name for entry in directory.iterdir() if entry.name not in rundir.OWN]
    strangers += [f"{rundir.CHECKPOINTS}/{entry.name}" for entry in (directory / rundir.CHECKPOINTS).glob("*")]
    if strangers:
        why = f"besides a run that failed it holds {', '.join(sorted(strangers)[:3])}"
        raise RunError(_in_the_way(directory, why, "choose a new training.output_dir, or move these files away"))
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != rundir.LOCK:
            entry.unlink()


def _in_the_way(directory: Path, why: str, fix: str) -> Problem:
    return Problem("output-dir", f"{directory} is in use", why=why, fix=fix)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a run directory for this process; raises RunError while another process trains in it."""
    import fcntl

    # A record lock: unlike flock's it is not inherited by loader workers, which outlive a killed run by seconds.
    with (directory / rundir.LOCK).open("w", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fix = "wait for it to end, or stop it"
            problem = Problem("output-dir", f"another process is training in {directory}", fix=fix)
            raise RunError(problem) from None
        yield


def settle(spec: RunSpec, decision: Decision) -> RunSpec:
    """Return the spec with what only the data or the model could tell, and write it down; one rank does."""
    section, key = decision.key.split(".")
    changed = getattr(spec.recipe, section).model_copy(update={key: decision.value})
    others = tuple(made for made in spec.decisions if made.key != decision.key)
    settled = replace(spec, recipe=replace(spec.recipe, **{section: changed}), decisions=(*others, decision))
    if os.environ.get("RANK", "0") == "0":
        rundir.write_text(Path(spec.recipe.training.output_dir) / rundir.RUN, settled.to_json())
    return settled


def _environment() -> str:
    from importlib import metadata

    names = sorted(
        {f"{found.name}=={found.version}" for found in metadata.distributions() if found.name}, key=str.lower
    )
    return "\n".join([f"# Python {platform.python_version()}, {platform.platform()}", *names]) + "\n"
