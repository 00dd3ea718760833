"""A recipe and a machine become a RunSpec: everything decided, nothing loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.errors import DataError, FtuneError, MachineError, Problem, RecipeError, RunError
from ftune.machine import Machine
from ftune.places import expanded
from ftune.recipe import Loaded, order, overrides, read, source, validate
from ftune.recipe.schema import Recipe, listed
from ftune.resolve import adapters, files, groups, output
from ftune.resolve.decide import decide
from ftune.resolve.huggingface import training_arguments
from ftune.resolve.spec import Decision, RunSpec
from ftune.rules import check, is_machine_rule, newly_broken

__all__ = [
    "Decision",
    "RunSpec",
    "check_later",
    "data_files",
    "examine",
    "findings",
    "raise_errors",
    "resolve",
    "with_training",
]

_SEVERITIES = ("error", "warning", "note")
_PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "tokenizers", "safetensors"),
    "schedulefree",
)


def findings(loaded: Loaded, machine: Machine | None, *, trains: bool = True) -> list[Problem]:
    """Return every problem that can be known without loading the model, errors first, each kind in file order.

    Where nobody is going to train, the run directory need not be free.
    """
    found = [*check(loaded, machine), *_file_problems(loaded.source, trains=trains), *groups.problems(loaded)]
    return sorted(found, key=lambda problem: (_SEVERITIES.index(problem.severity), *order(problem, loaded.source)))


def examine(
    recipe: str | Path | Mapping[str, Any], changes: Sequence[str], machine: Machine | None, *, trains: bool = True
) -> tuple[Loaded | None, list[Problem]]:
    """Return the recipe, if it is one, and every problem: those of its shape together with those of its files."""
    written = read(recipe, changes)
    try:
        loaded = validate(written, changes)
    except RecipeError as error:
        found = [*error.problems, *_file_problems(written, trains=trains)]
        return None, sorted(found, key=lambda problem: order(problem, written))
    return loaded, findings(loaded, machine, trains=trains)


def _file_problems(written: source.Source, *, trains: bool) -> list[Problem]:
    found = [*files.problems(written), *adapters.problems(written)]
    return found + (output.problems(written) if trains else [])


def check_later(spec: RunSpec, key: str, value: Any, say: Callable[[str], None]) -> None:
    """Raise RecipeError where what a run has found, as the value of a key, makes its recipe wrong; say what is odd."""
    text = source.parse(rundir.RECIPE, spec.recipe_text)
    section, name = key.split(".")
    settled = getattr(spec.recipe, section).model_copy(update={name: value})
    loaded = Loaded(spec.recipe, overrides.apply(text, spec.overrides), spec.overrides)
    found = newly_broken(loaded, replace(spec.recipe, **{section: settled}))
    raise_errors(found)
    for problem in found:
        if problem.severity == "warning":
            say(f"warning: {problem}")


def raise_errors(problems: list[Problem]) -> None:
    """Raise all errors at once, under the exit code of the first kind that occurs: recipe, machine, data, run."""
    errors = tuple(problem for problem in problems if problem.severity == "error")
    if errors:
        raise min((_kind(problem) for problem in errors), key=lambda kind: kind.exit_code)(*errors)


def _kind(problem: Problem) -> type[FtuneError]:
    if problem.rule == "output-dir":
        return RunError
    if problem.rule.startswith("data-"):
        return DataError
    return MachineError if is_machine_rule(problem) else RecipeError


def data_files(recipe: Recipe) -> list[str]:
    """Return what a decided recipe learns from: its data and the template that renders them."""
    template = [recipe.data.chat_template] if recipe.data.chat_template else []
    return [source.path for value in (recipe.data.train, recipe.data.eval) for source in listed(value)] + template


def resolve(loaded: Loaded, machine: Machine, *, fingerprints: bool = True) -> RunSpec:
    """Return everything decided; `fingerprints` reads the data files once (1 GB takes about 2 s)."""
    from ftune import __version__

    recipe, decisions = decide(loaded, machine)
    directory = str(expanded(recipe.training.output_dir).resolve())
    recipe = replace(recipe, training=recipe.training.model_copy(update={"output_dir": directory}))
    return RunSpec(
        recipe=recipe,
        training_arguments=training_arguments(recipe, device_type=machine.device_type),
        decisions=decisions,
        recipe_text=loaded.source.text,
        overrides=loaded.overrides,
        data_fingerprint=files.fingerprint(data_files(recipe)) if fingerprints else {},
        versions={name: machine.packages[name] for name in _PACKAGES if name in machine.packages},
        device_type=machine.device_type,
        ftune_version=__version__,
    )


def with_training(spec: RunSpec, **changes: Any) -> RunSpec:
    """Return a spec with other values in its training section, and in Hugging Face's spelling of it."""
    recipe = replace(spec.recipe, training=spec.recipe.training.model_copy(update=changes))
    arguments = training_arguments(recipe, device_type=spec.device_type)
    return replace(spec, recipe=recipe, training_arguments=arguments)
