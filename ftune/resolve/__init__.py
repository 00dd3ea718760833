"""A recipe and a machine become a RunSpec: everything decided, nothing loaded."""

from __future__ import annotations

from dataclasses import replace

from ftune.errors import DataError, MachineError, Problem, RecipeError
from ftune.machine import Machine
from ftune.recipe import Loaded
from ftune.resolve import files
from ftune.resolve.decide import decide
from ftune.resolve.huggingface import training_arguments
from ftune.resolve.spec import Decision, RunSpec
from ftune.rules import check, is_machine_rule

__all__ = ["Decision", "RunSpec", "findings", "raise_errors", "resolve"]

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "tokenizers", "safetensors")


def findings(loaded: Loaded, machine: Machine | None) -> list[Problem]:
    """Return every problem that can be known without loading the model: rules, then files."""
    return check(loaded, machine) + files.data_problems(loaded)


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


def resolve(loaded: Loaded, machine: Machine, *, fingerprints: bool = True) -> RunSpec:
    """Return everything decided; `fingerprints` reads the data files once (1 GB takes about 2 s)."""
    from ftune import __version__

    recipe, decisions = decide(loaded, machine)
    named = files.sources(recipe.data.train) + files.sources(recipe.data.eval)
    output = str(files.Path(recipe.training.output_dir).expanduser().resolve())
    recipe = replace(recipe, training=recipe.training.model_copy(update={"output_dir": output}))
    return RunSpec(
        recipe=recipe,
        training_arguments=training_arguments(recipe, device_type=machine.device_type),
        decisions=decisions,
        recipe_text=loaded.source.text,
        overrides=loaded.overrides,
        data_fingerprint=files.fingerprint(named) if fingerprints else {},
        versions={name: machine.packages[name] for name in _PACKAGES if name in machine.packages},
        device_type="cuda" if machine.gpus else "cpu",
        ftune_version=__version__,
    )
