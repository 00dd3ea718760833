"""Every recipe that comes with ftune loads, checks, resolves, and is taken by the installed transformers."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftune.machine import Gpu, Machine
from ftune.recipe import load
from ftune.recipe.schedules import SCHEDULES
from ftune.resolve import RunSpec, findings, resolve
from ftune.rules import RULES
from ftune.rules.check import example

_ROOT = Path(__file__).parents[2]
_RECIPES = sorted((_ROOT / "recipes").rglob("*.yaml"))
_PACKAGES = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes", "flash_attn"), "1.0")
_CPU = Machine(packages=_PACKAGES)
_H100 = Machine((Gpu("H100", 80 * 2**30, (9, 0)),), packages=_PACKAGES)


@pytest.mark.parametrize("machine", [_CPU, _H100], ids=["CPU", "H100"])
@pytest.mark.parametrize("path", _RECIPES, ids=[path.stem for path in _RECIPES])
def test_shipped_recipes_load_check_and_resolve(
    path: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no run of it stands in the way
    loaded = load(path)
    # Whether the model's package is installed is not the recipe's fault.
    errors = [problem for problem in findings(loaded, machine) if problem.severity == "error"]
    assert [problem for problem in errors if problem.rule != "package-missing"] == []
    spec = resolve(loaded, machine, fingerprints=False)
    assert RunSpec.from_json(spec.to_json()) == spec


def made_arguments(spec: RunSpec, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.TrainingArguments(output_dir=str(folder), **spec.training_arguments)


@pytest.mark.parametrize("path", _RECIPES, ids=[path.stem for path in _RECIPES])
def test_transformers_takes_every_shipped_recipe(path: Path, tmp_path: Path) -> None:
    made_arguments(resolve(load(path), _CPU, fingerprints=False), tmp_path)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.needs == "recipe"], ids=lambda rule: rule.id)
def test_transformers_takes_every_good_example(rule: Any, tmp_path: Path) -> None:
    loaded = example(rule.good)
    # A CPU takes no fp16; that it is handed on is what the H100 below is for.
    recipe = replace(loaded.recipe, training=loaded.recipe.training.model_copy(update={"fp16": False}))
    made_arguments(resolve(replace(loaded, recipe=recipe), _CPU, fingerprints=False), tmp_path)


def test_names_handed_on_are_those_of_the_installed_class() -> None:
    transformers = pytest.importorskip("transformers")
    known = inspect.signature(transformers.TrainingArguments).parameters
    for machine in (_CPU, _H100):
        assert set(resolve(example({}), machine).training_arguments) <= set(known)


def test_values_arrive(tmp_path: Path) -> None:
    changes = {
        "training": {
            "learning_rate": 3e-4,
            "warmup_steps": 0.1,
            "save_steps": 50,
            "gradient_accumulation_steps": 4,
            "lr_scheduler_type": "cosine",
            "lr_scheduler_kwargs": {"num_cycles": 1},
        }
    }
    arguments = made_arguments(resolve(example(changes), _CPU), tmp_path)
    assert (arguments.learning_rate, arguments.save_steps, arguments.gradient_accumulation_steps) == (3e-4, 50, 4)
    assert arguments.get_warmup_steps(200) == 20
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 1}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_options_are_those_of_transformers(name: str) -> None:
    """Each option is an argument of the schedule's function, with the same default."""
    optimization = pytest.importorskip("transformers.optimization")
    function = optimization.TYPE_TO_SCHEDULER_FUNCTION[optimization.SchedulerType(name)]
    known = inspect.signature(function).parameters
    fields = SCHEDULES[name].model_fields
    common = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert set(fields) == set(known) - common
    for key, field in fields.items():
        if not field.is_required():
            assert field.default == known[key].default
