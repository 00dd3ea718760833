"""A run directory: made for a new run, reopened for one that goes on, held by one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.errors import Problem, RunError
from ftune.machine import Machine
from ftune.recipe import Loaded, load, overrides
from ftune.resolve import Decision, RunSpec, raise_errors, resolve
from ftune.resolve.decide import settings_of
from ftune.resolve.files import fingerprint
from ftune.rules import check
from ftune.training import checkpoint

MAY_CHANGE = (
    "training.num_train_epochs",
    "training.max_steps",
    "training.per_device_eval_batch_size",
    "training.logging_steps",
    "training.eval_strategy",
    "training.eval_steps",
    "training.save_",
    "training.sample_",
    "training.report_to",
    "training.run_name",
    "training.dataloader_",
    "training.early_stopping_",
    "training.load_best_model_at_end",
    "training.output_dir",
    "data.eval",
)
"""Settings that a run may go on with changed: they do not touch what was already learned."""


@dataclass(frozen=True)
class Continued:
    """A run that goes on: what it runs, from where, and what the user should know."""

    spec: RunSpec
    checkpoint: Path | None
    notes: tuple[str, ...]


def create(spec: RunSpec) -> None:
    """Make the run directory of a new run; raises RunError where another run, or anything else, is in it."""
    directory = Path(spec.recipe.training.output_dir)
    if directory.exists() and not directory.is_dir():
        raise RunError(_in_the_way(directory, "it is a file", "choose another training.output_dir"))
    if directory.is_dir() and any(directory.iterdir()):
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
        for entry in directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _in_the_way(directory: Path, why: str, fix: str) -> Problem:
    return Problem("output-dir", f"{directory} is in use", why=why, fix=fix)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a run directory for this process; raises RunError while another process trains in it."""
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for it to end, or stop it"
            problem = Problem("output-dir", f"another process is training in {directory}", fix=fix)
            raise RunError(problem) from None
        yield
    finally:
        os.close(descriptor)


def reopen(directory: Path, changes: Sequence[str], machine: Machine) -> Continued:
    """Return what a stopped run goes on with; raises RunError where it cannot, saying what differs."""
    spec = _read_spec(directory)
    spec = _with_output(spec, directory.resolve())
    if changes:
        spec = _changed(directory, spec, changes, machine)
    elif _status(directory) == "finished":
        fix = "train longer: ftune resume DIR --set training.num_train_epochs=N; or talk to it: ftune chat DIR"
        raise RunError(Problem("resume-finished", f"the run in {directory} is finished", fix=fix))
    raise_errors(check(Loaded(spec.recipe, _source(spec)), machine))
    notes = list(_check_data(spec)) + list(_differences(spec, machine))
    found, damaged = checkpoint.latest(directory)
    notes += [f"{path.name} is damaged ({why}); going back to the one before" for path, why in damaged]
    notes.append(f"going on from {found.name}" if found else "nothing was saved yet: starting from the beginning")
    return Continued(spec, found, tuple(notes))


def _read_spec(directory: Path) -> RunSpec:
    path = directory / rundir.RUN
    if not path.exists():
        fix = "name the training.output_dir of a run; `ftune train RECIPE` starts one"
        raise RunError(Problem("resume-directory", f"{directory} is not a run directory", why=f"no {path}", fix=fix))
    try:
        return RunSpec.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        why = str(error).split("\n", maxsplit=1)[0]
        fix = "start anew from the recipe.yaml beside it"
        raise RunError(Problem("resume-damaged", f"{path} cannot be read", why=why, fix=fix)) from None


def _with_output(spec: RunSpec, directory: Path) -> RunSpec:
    training = spec.recipe.training.model_copy(update={"output_dir": str(directory)})
    return replace(spec, recipe=replace(spec.recipe, training=training))


def _source(spec: RunSpec) -> Any:
    from ftune.recipe import source

    return source.Source(rundir.RECIPE, spec.recipe_text, {})


def _status(directory: Path) -> str:
    try:
        return str(json.loads((directory / rundir.RESULT).read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError):
        return "unknown"


def _changed(directory: Path, spec: RunSpec, changes: Sequence[str], machine: Machine) -> RunSpec:
    """Return the spec with changes applied; raises RunError where they touch what was already learned."""
    loaded = load(directory / rundir.RECIPE, (*spec.overrides, *changes))
    fresh = _with_output(resolve(loaded, machine), directory.resolve())
    before, after = settings_of(spec.recipe), settings_of(fresh.recipe)
    found_again = {"data.format", "data.train", "data.eval", "data.chat_template", "model.model_name_or_path"}
    named = {change.partition("=")[0].strip() for change in changes}
    differing = [key for key in after if before.get(key) != after[key] and (key not in found_again or key in named)]
    refused = [key for key in differing if not key.startswith(MAY_CHANGE)]
    if refused:
        why = "; ".join(f"{key}: {before.get(key)} -> {after[key]}" for key in refused)
        fix = "start a new run with these settings: ftune train RECIPE --set training.output_dir=..."
        what = "a run cannot go on with other settings for what it has already learned"
        raise RunError(Problem("resume-changed", what, why=why, fix=fix))
    kept = [key for key in found_again if key not in named]
    recipe = fresh.recipe
    for key in kept:
        section, name = key.split(".")
        old = getattr(getattr(spec.recipe, section), name)
        recipe = replace(recipe, **{section: getattr(recipe, section).model_copy(update={name: old})})
    # What was read before must still be what it was: a fresh fingerprint would vouch for rows that have changed.
    before_that = {name: digest for name, digest in spec.data_fingerprint.items() if name in fresh.data_fingerprint}
    changed = replace(fresh, recipe=recipe, data_fingerprint={**fresh.data_fingerprint, **before_that})
    rundir.write_text(directory / rundir.OVERRIDES, overrides.as_yaml(changed.overrides))
    rundir.write_text(directory / rundir.RUN, changed.to_json())
    return changed


def _check_data(spec: RunSpec) -> Iterator[str]:
    now = fingerprint(list(spec.data_fingerprint))
    for name, before in spec.data_fingerprint.items():
        if name not in now:
            problem = Problem("resume-data", f"{name} is gone", fix="put it back: the run was learning from it")
            raise RunError(problem)
        if now[name] != before:
            why = "its rows would no longer be seen in the order in which the run began"
            fix = "put the old file back, or start a new run"
            raise RunError(Problem("resume-data", f"{name} has changed since the run began", why=why, fix=fix))
    yield from ()


def _differences(spec: RunSpec, machine: Machine) -> Iterator[str]:
    for name, before in spec.versions.items():
        now = machine.packages.get(name)
        if now != before:
            yield f"{name} is {now or 'missing'} now, and was {before}: results may differ in the last digits"
    if spec.device_type != ("cuda" if machine.gpus else "cpu"):
        yield f"the run began on {spec.device_type}: results will differ in the last digits"


def settle(spec: RunSpec, *, format_found: str) -> RunSpec:
    """Return the spec with what only the data could tell, and write it down; one rank does."""
    if spec.recipe.data.format != "auto":
        return spec
    decision = Decision("data.format", format_found, "the first row has its keys")
    data = spec.recipe.data.model_copy(update={"format": format_found})
    settled = replace(spec, recipe=replace(spec.recipe, data=data), decisions=(*spec.decisions, decision))
    if os.environ.get("RANK", "0") == "0":
        rundir.write_text(Path(spec.recipe.training.output_dir) / rundir.RUN, settled.to_json())
    return settled


def _environment() -> str:
    from importlib import metadata

    names = sorted(
        {f"{found.name}=={found.version}" for found in metadata.distributions() if found.name}, key=str.lower
    )
    return "\n".join([f"# Python {platform.python_version()}, {platform.platform()}", *names]) + "\n"
