"""LoRA beside trained weights in whole runs: what is saved, gone on with, evaluated, and done by two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_runs import losses, metrics, recipe, rows_file, same_bits, weights

import ftune
from ftune.errors import RecipeError
from ftune.machine import probe
from ftune.training import resuming, run

TUNING = {"method": "lora_and_full", "r": 4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40)


def settings_of(optim: str, **more: Any) -> dict[str, Any]:
    rate = {"lomo": 0.1, "adalomo": 5e-3}.get(optim, 3e-3)
    args = {"adapter_learning_rate": 3e-3} if optim in ("lomo", "adalomo") else {}
    return {"optim": optim, "optim_args": args, "learning_rate": rate, **more}


def evaluated(directory: Path | str) -> list[float]:
    return [line["eval_loss"] for line in metrics(directory) if "eval_loss" in line]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optim", ["lomo", "adalomo", "adamw_torch"])
def test_ten_steps_and_ten_more_are_twenty(
    optim: str, dtype: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    training = settings_of(optim, max_steps=20, save_strategy="steps", save_steps=10, lr_scheduler_type="cosine")
    values = recipe(tiny_model, rows, tmp_path / "run", model={"dtype": dtype}, tuning=TUNING, training=training)
    whole = Path(ftune.train(values).directory)
    found = losses(whole)
    assert sum(found[-5:]) < 0.95 * sum(found[:5])
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(stopped / "model")
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-20")
    (stopped / "result.json").unlink()
    continued = resuming.reopen(stopped, (), probe())
    assert continued.checkpoint is not None
    assert continued.checkpoint.name == "checkpoint-10"
    run.train(continued.spec, checkpoint=continued.checkpoint)
    assert same_bits(weights(whole), weights(stopped))
    assert losses(stopped) == found


def test_an_adapter_that_begins_along_its_inputs(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """B begins at zero: the first step says what the model says, and the next ones go another way."""
    found = []
    for start in (True, "eva"):
        tuning = {**TUNING, "init_lora_weights": start, "eva_batches": 2}
        training = settings_of("adamw_torch", max_steps=3)
        values = recipe(tiny_model, rows, tmp_path / str(start), tuning=tuning, training=training)
        found.append(losses(ftune.train(values).directory))
    assert found[0][0] == found[1][0]
    assert found[0][1:] != found[1][1:]


class TestARun:
    @pytest.fixture(scope="class")
    def finished(self, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path, ftune: Any) -> Path:
        """Run as a user does, with evaluation, samples and the best checkpoint at the end."""
        folder = tmp_path_factory.mktemp("combined")
        training = settings_of("lomo", max_steps=12, save_strategy="steps", save_steps=6, eval_steps=3)
        training |= {"lr_scheduler_type": "constant", "learning_rate": 8.0}
        training |= {"load_best_model_at_end": True, "sample_prompts": ["Hello"], "sample_max_new_tokens": 4}
        data = {"eval": str(rows)}
        values = recipe(tiny_model, rows, folder / "run", data=data, tuning=TUNING, training=training)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        done = ftune("train", path)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder / "run"

    def test_what_is_saved_is_a_whole_model(self, finished: Path, tiny_model: Path) -> None:
        from transformers import AutoModelForCausalLM

        model, report = AutoModelForCausalLM.from_pretrained(finished / "model", output_loading_info=True)
        assert not any(report.values()), report
        assert not list((finished / "model").glob("adapter*"))
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        assert weights(finished).keys() == base.state_dict().keys()
        assert json.loads((finished / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        moved = [name for name, weight in base.state_dict().items() if (weights(finished)[name] != weight).any()]
        assert len(moved) == len(base.state_dict()), "every weight"
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_the_saved_model_is_the_best_one_with_its_adapter_folded_in(
        self, finished: Path, rows: Path, tmp_path: Path
    ) -> None:
        found = evaluated(finished)
        best = min(found)
        assert best != found[-1], "the rate is too high for the last weights to be the best"
        assert json.loads((finished / "result.json").read_text())["eval_loss"] == best
        data = {"eval": str(rows)}
        again = recipe(finished / "model", rows, tmp_path / "again", data=data, training={"max_steps": 1})
        assert evaluated(ftune.train(again).directory)[0] == pytest.approx(best, rel=1e-6)

    def test_a_checkpoint_has_both_and_state_for_the_adapter_alone(self, finished: Path) -> None:
        from safetensors.torch import load_file

        checkpoint = finished / "checkpoints" / "checkpoint-12"
        kept = load_file(checkpoint / "model.safetensors")
        added = [tensor for name, tensor in kept.items() if "lora_" in name]
        assert len(added) == 2 * 7 * 2
        assert len(kept) - len(added) == len(weights(finished))
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        own, norms, beside = state["param_groups"]
        assert [group["adapter"] for group in (own, norms, beside)] == [False, False, True]
        assert (own["lr"], beside["lr"]) == (8.0, 3e-3)
        with_state = {number for number, entry in state["state"].items() if entry}
        assert with_state == set(beside["params"])

    def test_samples_of_after_are_those_of_the_folded_model(self, finished: Path, ftune: Any) -> None:
        lines = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
        assert {line["when"] for line in lines} == {"before", "during", "after"}
        refused = ftune("merge", finished, "--output", finished / "merged")
        assert refused.returncode == 2
        assert "no adapter to merge" in refused.stderr


@pytest.mark.parametrize("optim", ["lomo", pytest.param("adalomo", marks=pytest.mark.slow)])
def test_two_ranks_are_one_with_both_halves(
    optim: str, tiny_model: Path, rows: Path, tmp_path: Path, launched: Any
) -> None:
    shared = settings_of(optim, max_steps=4, lr_scheduler_type="constant")
    shared |= {"learning_rate": shared["learning_rate"] / 10, "optim_args": {"adapter_learning_rate": 3e-4}}
    alone = recipe(
        tiny_model, rows, tmp_path / "one", tuning=TUNING, training={**shared, "per_device_train_batch_size": 8}
    )
    one = ftune.train(alone).directory
    values = recipe(tiny_model, rows, tmp_path / "two", tuning=TUNING, training=shared)
    launched(values, tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-6)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=1e-6, atol=1e-6)


def test_copies_of_trained_layers_are_refused(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    tuning = {**TUNING, "modules_to_save": ["lm_head"]}
    with pytest.raises(RecipeError) as caught:
        ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning, training=settings_of("lomo")))
    assert [problem.rule for problem in caught.value.problems] == ["modules-move-already"]
