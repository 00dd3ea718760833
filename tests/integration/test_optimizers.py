"""Every optimizer through a whole run: its loss falls, and a killed run goes on to the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import losses, metrics, recipe, rows_file, same_bits, weights

import ftune
from ftune import plugin

PROJECTED = {"rank": 8, "update_proj_gap": 3}
SMALL = {"min_8bit_size": 1000}
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "galore_adamw": (PROJECTED, 1e-2),
    "galore_adamw_layerwise": (PROJECTED, 1e-2),
    "apollo_adamw": (PROJECTED, 3e-3),
    "apollo_adamw_layerwise": ({"rank": 1, "scale": 8, "scale_type": "tensor", "update_proj_gap": 3}, 3e-3),
    "adamw_8bit": (SMALL, 3e-3),
    "paged_adamw_32bit": ({}, 3e-3),
    "lion_8bit": (SMALL, 1e-3),
    "paged_lion_8bit": (SMALL, 1e-3),
    "lion_32bit": ({}, 1e-3),
    "muon": ({}, 3e-3),
    "schedule_free_adamw": ({}, 1e-2),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls_and_a_killed_run_goes_on(name: str, tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    from ftune.machine import probe
    from ftune.training import resuming
    from ftune.training.run import train

    for package in plugin.optimizer(name).needs:
        pytest.importorskip(package)
    options, rate = CASES[name]
    training = {
        "optim": name,
        "optim_args": options,
        "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": None,
    }
    run = Path(ftune.train(recipe(tiny_model, rows, tmp_path / "run", training=training)).directory)
    found = losses(run)
    assert sum(found[-4:]) < 0.99 * sum(found[:4]), found
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "model")
    (copy / "result.json").unlink()
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > 4:
            shutil.rmtree(path)
    continued = resuming.reopen(copy, (), probe())
    train(continued.spec, plain=True, checkpoint=continued.checkpoint)
    assert same_bits(weights(copy), weights(run))
    assert losses(copy) == found
    assert json.loads((copy / "result.json").read_text())["steps"] == 10


@pytest.mark.parametrize("best", [False, True])
def test_what_is_saved_and_evaluated_is_the_average(best: bool, tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    """Of a schedule-free run: not the point it trained at, and whether or not it looked at itself on the way."""
    pytest.importorskip("schedulefree")
    training = {"optim": "schedule_free_adamw", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 6}
    training |= {"save_strategy": "steps", "save_steps": 6, "eval_steps": 6, "load_best_model_at_end": best}
    values = recipe(tiny_model, rows, tmp_path / "run", data={"eval": str(rows)}, training=training)
    run = Path(ftune.train(values).directory)
    state = torch.load(run / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    assert all({"z", "y"} <= entry.keys() for entry in state.values())
    saved = weights(run)
    names = [name for group in groups_of(tiny_model) for name in group]
    for number, name in enumerate(names):
        average = (state[number]["y"] - 0.1 * state[number]["z"]) / 0.9  # y = (1 - beta1) z + beta1 x
        assert (saved[name] - average).abs().max() <= 1e-6, name
        assert (saved[name] - state[number]["y"]).abs().max() > 1e-5, name
    often = {**training, "eval_steps": 1, "save_steps": 2}
    values = recipe(tiny_model, rows, tmp_path / "often", data={"eval": str(rows)}, training=often)
    assert losses(Path(ftune.train(values).directory)) == losses(run), "looking changes nothing"
    evaluated = [line["eval_loss"] for line in metrics(run) if "eval_loss" in line][-1]
    again = recipe(run / "model", rows, tmp_path / "again", data={"eval": str(rows)}, training={"max_steps": 1})
    first = next(line["eval_loss"] for line in metrics(Path(ftune.train(again).directory)) if "eval_loss" in line)
    assert first == pytest.approx(evaluated, rel=1e-6)


def groups_of(model: Path) -> list[list[str]]:
    """Return the names of a model's decayed weights and of the others, in the order of the optimizer's groups."""
    from transformers import AutoModelForCausalLM

    named = [name for name, _ in AutoModelForCausalLM.from_pretrained(model).named_parameters()]
    return [[name for name in named if "norm" not in name], [name for name in named if "norm" in name]]
