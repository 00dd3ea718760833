"""A recipe and a machine become a RunSpec: everything decided, nothing loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftune.errors import DataError, MachineError, Problem, RecipeError
from ftune.machine import Machine
from ftune.recipe import Loaded, order, read, validate
from ftune.recipe.schema import Recipe
from ftune.resolve import files
from ftune.resolve.decide import decide
from ftune.resolve.huggingface import training_arguments
from ftune.resolve.spec import Decision, RunSpec
from ftune.rules import check, is_machine_rule

__all__ = ["Decision", "RunSpec", "data_files", "examine", "findings", "raise_errors", "resolve"]

_SEVERITIES = ("error", "warning", "note")
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "tokenizers", "safetensors")


def findings(loaded: Loaded, machine: Machine | None) -> list[Problem]:
    """Return every problem that can be known without loading the model, errors first, each kind in file order."""
    found = check(loaded, machine) + files.problems(loaded.source)
    return sorted(found, key=lambda problem: (_SEVERITIES.index(problem.severity), *order(problem, loaded.source)))


def examine(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str], machine: Machine | None
) -> tuple[Loaded | None, list[Problem]]:
    """Return the recipe, if it is one, and every problem: those of its shape together with those of its files."""
    source = read(recipe, overrides)
    try:
        loaded = validate(source, overrides)
    except RecipeError as error:
        found = [*error.problems, *files.problems(source)]
        return None, sorted(found, key=lambda problem: order(problem, source))
    return loaded, findings(loaded, machine)


def raise_errors(problems: list[Problem]) -> None:
    """Raise all errors at once, under the exit code of the first kind that occurs: recipe, machine, data."""
    errors = tuple(problem for problem in problems if problem.severity == "error")
    if not errors:
        return
    if all(problem.rule.startswith("data-") for problem in errors):
        raise DataError(*errors)
    if all(is_machine_rule(problem) or problem.rule.startswith("data-") for problem in errors):
        raise MachineError(*errors)
    raise RecipeError(*errors)


def data_files(recipe: Recipe) -> list[str]:
    """Return what a decided recipe learns from: its data and the template that renders them."""
    template = [recipe.data.chat_template] if recipe.data.chat_template else []
    return files.sources(recipe.data.train) + files.sources(recipe.data.eval) + template


def resolve(loaded: Loaded, machine: Machine, *, fingerprints: bool = True) -> RunSpec:
    """Return everything decided; `fingerprints` reads the data files once (1 GB takes about 2 s)."""
    from ftune import __version__

    recipe, decisions = decide(loaded, machine)
    output = str(Path(recipe.training.output_dir).expanduser().resolve())
    recipe = replace(recipe, training=recipe.training.model_copy(update={"output_dir": output}))
    return RunSpec(
        recipe=recipe,
        training_arguments=training_arguments(recipe, device_type=machine.device_type),
        decisions=decisions,
        recipe_text=loaded.source.text,
        overrides=loaded.overrides,
        data_fingerprint=files.fingerprint(data_files(recipe)) if fingerprints else {},
        versions={name: machine.packages[name] for name in _PACKAGES if name in machine.packages},
        device_type="cuda" if machine.gpus else "cpu",
        ftune_version=__version__,
    )
