"""Going on with a stopped run: what must be as it was, what may be changed, and from which checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.errors import Problem, RunError
from ftune.machine import Machine
from ftune.models.finished import spec_of
from ftune.recipe import Loaded, load, overrides, source
from ftune.resolve import RunSpec, data_files, raise_errors, resolve
from ftune.resolve.decide import settings_of
from ftune.resolve.files import fingerprint
from ftune.resolve.huggingface import training_arguments
from ftune.rules import check
from ftune.training import checkpoint
from ftune.training.directory import held
from ftune.training.other_ranks import for_ranks
from ftune.training.passes import keep_passes

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
    "training.on_out_of_memory",
    "training.load_best_model_at_end",
    "data.num_proc",
    "distributed.",
)
"""Settings that a run may go on with changed: they do not touch what was already learned."""
FOUND_AGAIN = (
    *("data.format", "data.train", "data.eval", "data.chat_template", "model.model_name_or_path"),
    *("training.per_device_train_batch_size", "training.gradient_accumulation_steps"),
)
"""Settings that hold what was found when the run began; they are looked for anew only when they are named."""
DAMAGED_SUFFIX = ".damaged"


@dataclass(frozen=True)
class Continued:
    """A run that goes on: what it runs, from where, and what the user should know."""

    spec: RunSpec
    checkpoint: Path | None
    notes: tuple[str, ...]


def go_on(directory: Path, machine: Machine) -> Continued:
    """Return what a rank of a launch trains: from the beginning, or from the newest whole checkpoint.

    Whoever launched it has compared the rest; this host's own packages and devices are looked at here.
    """
    spec = _with_output(_read_spec(directory), directory.resolve())
    raise_errors(check(Loaded(spec.recipe, source.Source(rundir.RECIPE, spec.recipe_text, {})), machine))
    found, damaged = checkpoint.latest(directory)
    notes: list[str] = []
    if found is not None:
        spec, notes = for_ranks(spec, found, ranks_here())
        notes.append(f"going on from {found.name}")
    if os.environ.get("RANK", "0") == "0":
        _put_aside(path for path, _ in damaged)
    return Continued(spec, found, tuple(notes))


def ranks_here() -> int:
    """Return of how many processes this one is, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def reopen(directory: Path, changes: Sequence[str], machine: Machine, *, ranks: int | None = None) -> Continued:
    """Return what a stopped run goes on with; raises RunError where it cannot, saying what differs.

    `ranks` is how many processes it goes on with, by default those that there are.
    """
    before = _with_output(_read_spec(directory), directory.resolve())
    if not changes and rundir.status(directory) == "finished":
        raise RunError(_finished(directory, before))
    if "training.output_dir" in _named(changes):
        what, why = "a run goes on in its own directory", "training.output_dir says where a new run is made"
        fix = f"move or rename {directory} itself, then resume it there"
        raise RunError(Problem("resume-changed", what, why=why, fix=fix))
    said: list[Problem] = []
    shared: list[str] = []
    if changes:
        spec, loaded = _changed(directory, before, changes, machine)
        said = check(loaded, machine)
        raise_errors(said)
    else:
        spec = before
        raise_errors(check(Loaded(spec.recipe, source.Source(rundir.RECIPE, spec.recipe_text, {})), machine))
    _check_data(spec)
    main = os.environ.get("RANK", "0") == "0"
    with held(directory) if main else contextlib.nullcontext():
        found, damaged = checkpoint.latest(directory)
        if found is not None:
            spec, shared = for_ranks(spec, found, ranks or ranks_here())
        if rundir.status(directory) == "finished":
            _require_more(directory, before, spec, found)
        if main:
            _put_aside(path for path, _ in damaged)
            if changes:
                _write_down(directory, spec)
    notes = [f"{problem.severity}: {problem}" for problem in said] + shared
    notes += _differences(spec, machine)
    notes += [f"{path.name} is damaged ({why}); going back to the one before" for path, why in damaged]
    notes.append(f"going on from {found.name}" if found else "nothing was saved yet: starting from the beginning")
    return Continued(spec, found, tuple(notes))


def _read_spec(directory: Path) -> RunSpec:
    path = directory / rundir.RUN
    if not path.exists():
        fix = "name the training.output_dir of a run; `ftune train RECIPE` starts one"
        raise RunError(Problem("resume-directory", f"{directory} is not a run directory", why=f"no {path}", fix=fix))
    return spec_of(directory)


def _with_output(spec: RunSpec, directory: Path) -> RunSpec:
    training = spec.recipe.training.model_copy(update={"output_dir": str(directory)})
    return replace(spec, recipe=replace(spec.recipe, training=training))


def _finished(directory: Path, spec: RunSpec, why: str = "") -> Problem:
    key = "max_steps" if spec.recipe.training.max_steps > 0 else "num_train_epochs"
    fix = f"train longer: ftune resume {directory} --set training.{key}=N; or talk to it: ftune chat {directory}"
    return Problem("resume-finished", f"the run in {directory} is finished; nothing more to do", why=why, fix=fix)


def _require_more(directory: Path, before: RunSpec, spec: RunSpec, found: Path | None) -> None:
    """Raise RunError where a finished run would take no more steps: it would end at once, as if it had trained."""
    done = int(json.loads((directory / rundir.RESULT).read_text(encoding="utf-8")).get("steps", 0))
    old, new = before.recipe.training, spec.recipe.training
    taken = f"it took {done} steps, and with these settings it takes no more"
    if found is not None and json.loads((found / checkpoint.STATE).read_text(encoding="utf-8"))["stopped_early"]:
        raise RunError(_finished(directory, spec, f"it stopped early, after {done} steps"))
    if new.max_steps > 0:
        grows = new.max_steps > done
        taken = f"training.max_steps: {new.max_steps} decides how long it trains; {taken}"
    elif old.max_steps <= 0 and new.num_train_epochs <= old.num_train_epochs:
        grows = False
    else:
        grows = found is None or math.ceil(_steps_of_an_epoch(found) * new.num_train_epochs) > done
    if not grows:
        raise RunError(_finished(directory, spec, taken))


def _steps_of_an_epoch(found: Path) -> int:
    state = json.loads((found / "trainer_state.json").read_text(encoding="utf-8"))
    return round(state["global_step"] / state["epoch"])


def _named(changes: Sequence[str]) -> set[str]:
    """Return the dotted keys of changes, written as `--set` reads them."""
    return {".".join(part.strip() for part in change.partition("=")[0].split(".")) for change in changes}


def _changed(directory: Path, spec: RunSpec, changes: Sequence[str], machine: Machine) -> tuple[RunSpec, Loaded]:
    """Return the spec with changes applied, and its recipe; raises RunError where they touch what was learned."""
    named = _named(changes)
    loaded = load(directory / rundir.RECIPE, (*spec.overrides, *changes))
    fresh = keep_passes(_with_output(resolve(loaded, machine, fingerprints=False), directory.resolve()), spec)
    recipe, written = fresh.recipe, loaded.recipe
    for key in FOUND_AGAIN:
        if key not in named:
            section, name = key.split(".")
            old = {name: getattr(getattr(spec.recipe, section), name)}
            recipe = replace(recipe, **{section: getattr(recipe, section).model_copy(update=old)})
            written = replace(written, **{section: getattr(written, section).model_copy(update=old)})
    kept = {key for key in FOUND_AGAIN if key not in named}
    decisions = [decision for decision in fresh.decisions if decision.key not in kept]
    decisions += [decision for decision in spec.decisions if decision.key in kept]
    arguments = training_arguments(recipe, device_type=fresh.device_type)
    fresh = replace(fresh, recipe=recipe, decisions=tuple(decisions), training_arguments=arguments)
    before, after = settings_of(spec.recipe), settings_of(recipe)
    refused = [key for key in after if before.get(key) != after[key] and not _may_change(key, before[key], after[key])]
    if refused:
        why = "; ".join(f"{key}: {before.get(key)} -> {after[key]}" for key in refused)
        fix = "start a new run with these settings: ftune train RECIPE --set training.output_dir=..."
        what = "a run cannot go on with other settings for what it has already learned"
        raise RunError(Problem("resume-changed", what, why=why, fix=fix))
    # What was read before must still be what it was: a fresh fingerprint would vouch for rows that have changed.
    digests = spec.data_fingerprint
    if "data.eval" in named:
        now = fingerprint(data_files(recipe))
        digests = {name: digests.get(name, digest) for name, digest in now.items()}
    return replace(fresh, data_fingerprint=digests), replace(loaded, recipe=written)


def _may_change(key: str, before: Any, after: Any) -> bool:
    """A fraction is held out of the training rows: to or from one, the rows that are trained change too."""
    if key == "data.eval":
        return not isinstance(before, float) and not isinstance(after, float)
    return key.startswith(MAY_CHANGE)


def _write_down(directory: Path, spec: RunSpec) -> None:
    """Make changes part of the run; how it ended before is no longer true."""
    for name in (rundir.RESULT, rundir.REPORT):
        (directory / name).unlink(missing_ok=True)
    rundir.write_text(directory / rundir.OVERRIDES, overrides.as_yaml(spec.overrides))
    rundir.write_text(directory / rundir.RUN, spec.to_json())


def _put_aside(damaged: Iterator[Path]) -> None:
    """Rename damaged checkpoints, so that they do not count among those that are kept."""
    for path in damaged:
        path.rename(path.with_name(path.name + DAMAGED_SUFFIX))


def _check_data(spec: RunSpec) -> None:
    now, before = fingerprint(data_files(spec.recipe)), spec.data_fingerprint
    for name in sorted({*now, *before}):
        if now.get(name) == before.get(name):
            continue
        how = "is gone" if name not in now else "is new" if name not in before else "has changed since the run began"
        why = "its rows would no longer be seen in the order in which the run began"
        fix = "put the files back as they were, or start a new run"
        raise RunError(Problem("resume-data", f"{name} {how}", why=why, fix=fix))


def _differences(spec: RunSpec, machine: Machine) -> Iterator[str]:
    for name, before in spec.versions.items():
        now = machine.packages.get(name)
        if now != before:
            yield f"{name} is {now or 'missing'} now, and was {before}: results may differ in the last digits"
    if spec.device_type != machine.device_type:
        yield f"the run began on {spec.device_type}: results will differ in the last digits"
