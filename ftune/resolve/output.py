"""Whether the run directory can be made: `ftune check` says what `ftune train` would refuse."""

from __future__ import annotations

import os
from pathlib import Path

from ftune import rundir
from ftune.errors import Place, Problem, RecipeError
from ftune.places import expanded
from ftune.recipe.source import Source

_KEY = ("training", "output_dir")


def problems(source: Source) -> list[Problem]:
    """Return what stands in the way of the run directory that a recipe names."""
    section = source.data.get("training")
    name = section.get("output_dir") if isinstance(section, dict) else None
    if not isinstance(name, str) or not name.strip():
        return []
    place = source.value(_KEY)
    try:
        # The first rank makes the directory; the others find it made.
        found = in_the_way(expanded(name, place).resolve(), place) if os.environ.get("RANK", "0") == "0" else None
    except RecipeError as error:
        return list(error.problems)
    except OSError as error:
        fix = "choose a training.output_dir you can write to"
        found = Problem("output-dir", f"cannot look into {name}", place, why=str(error), fix=fix)
    return [found] if found else []


def in_the_way(directory: Path, place: Place | None = None) -> Problem | None:
    """Return the problem of a directory that holds work; what a run left that never took a step counts for nothing."""
    if directory.exists() and not directory.is_dir():
        return _taken(directory, place, "it is a file", "choose another training.output_dir")
    names = {entry.name for entry in directory.iterdir()} - {rundir.LOCK} if directory.is_dir() else set()
    if not names:
        return None
    if rundir.RUN not in names:
        return _taken(directory, place, "it holds other files", "choose a new training.output_dir")
    if rundir.checkpoints(directory) or {rundir.METRICS, rundir.MODEL} & names:
        fix = f"{_ways_on(directory)}; or start anew elsewhere: --set training.output_dir=..."
        return _taken(directory, place, "it holds another run", fix)
    if strangers := rundir.strangers(directory):
        why = f"besides a run that failed it holds {', '.join(strangers[:3])}"
        return _taken(directory, place, why, "choose a new training.output_dir, or move these files away")
    return None


def _ways_on(directory: Path) -> str:
    if rundir.status(directory) != "finished":
        return f"go on with it: ftune resume {directory}"
    longer = f"ftune resume {directory} --set training.num_train_epochs=N (or training.max_steps=N)"
    return f"it is finished; talk to it: ftune chat {directory}; or train it longer: {longer}"


def _taken(directory: Path, place: Place | None, why: str, fix: str) -> Problem:
    return Problem("output-dir", f"{directory} is in use", place, why=why, fix=fix)
