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
from ftune.places import expanded
from ftune.recipe import overrides
from ftune.resolve import Decision, RunSpec
from ftune.resolve.huggingface import training_arguments
from ftune.resolve.output import in_the_way
from ftune.training import checkpoint


def create(spec: RunSpec) -> None:
    """Make the run directory of a new run; raises RunError where another run, or anything else, is in it."""
    directory = expanded(spec.recipe.training.output_dir)
    try:
        _refuse_what_holds_work(directory)
        if directory.is_dir() and any(entry.name != rundir.LOCK for entry in directory.iterdir()):
            with held(directory):
                _refuse_what_holds_work(directory)  # that another process may have begun meanwhile
                _clear(directory)
        (directory / rundir.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        rundir.write_text(directory / rundir.RECIPE, spec.recipe_text)
        if spec.overrides:
            rundir.write_text(directory / rundir.OVERRIDES, overrides.as_yaml(spec.overrides))
        rundir.write_text(directory / rundir.ENVIRONMENT, _environment())
        rundir.write_text(directory / rundir.RUN, spec.to_json())
    except OSError as error:
        fix = "choose a training.output_dir you can write to, on a disk with room"
        raise RunError(Problem("output-dir", f"cannot write to {directory}", why=str(error), fix=fix)) from None


def _refuse_what_holds_work(directory: Path) -> None:
    problem = in_the_way(directory)
    if problem is not None:
        raise RunError(problem)


def _clear(directory: Path) -> None:
    """Remove what a run left that never took a step: all of it is ftune's own."""
    checkpoint.remove_partial(directory)
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != rundir.LOCK:
            entry.unlink()


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


def settle(spec: RunSpec, *decisions: Decision) -> RunSpec:
    """Return the spec with what only the data, the model or a plan could tell, and write it down; one rank does."""
    recipe = spec.recipe
    for decision in decisions:
        section, key = decision.key.split(".")
        recipe = replace(recipe, **{section: getattr(recipe, section).model_copy(update={key: decision.value})})
    arguments = training_arguments(recipe, device_type=spec.device_type)
    return note(replace(spec, recipe=recipe, training_arguments=arguments), *decisions)


def note(spec: RunSpec, *decisions: Decision) -> RunSpec:
    """Return the spec with decisions in the place of earlier ones on the same, and write it down; one rank does."""
    again = {decision.key for decision in decisions}
    others = tuple(made for made in spec.decisions if made.key not in again)
    noted = replace(spec, decisions=(*others, *decisions))
    if os.environ.get("RANK", "0") == "0":
        rundir.write_text(Path(spec.recipe.training.output_dir) / rundir.RUN, noted.to_json())
    return noted


def _environment() -> str:
    from importlib import metadata

    names = sorted(
        {f"{found.name}=={found.version}" for found in metadata.distributions() if found.name}, key=str.lower
    )
    return "\n".join([f"# Python {platform.python_version()}, {platform.platform()}", *names]) + "\n"
