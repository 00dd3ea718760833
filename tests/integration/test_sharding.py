"""Whole runs with weights split over ranks, against one process with the same rows in each step."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_runs import losses, metrics, on_ranks, recipe, rows_file, same_bits, weights

import ftune

ADAMW = {"optim": "adamw_torch", "max_grad_norm": 1.0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 48)


def start(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `ftune` on so many ranks."""
    return on_ranks(ranks, "-m", "ftune", *arguments)


def written(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def values_of(
    model: Path, rows: Path, output: Path, *, ranks: int, training: dict[str, Any], **sections: Any
) -> dict[str, Any]:
    """Return a recipe whose steps take 8 rows, on however many ranks."""
    settings = {"per_device_train_batch_size": 8 // ranks, "save_strategy": "steps", "save_steps": 2, **training}
    settings["save_total_limit"] = None
    distributed = {"zero_stage": 3} if ranks > 1 else {}
    return recipe(model, rows, output, data={"eval": str(rows)}, training=settings, distributed=distributed, **sections)


def equal_runs(one: Path, two: Path, *, rel: float = 1e-5) -> None:
    """See that two runs had the same losses and norms, and ended with the same weights."""
    assert losses(two) == pytest.approx(losses(one), rel=rel)
    norms = [[line["grad_norm"] for line in metrics(run) if "grad_norm" in line] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=rel)
    results = [json.loads((run / "result.json").read_text()) for run in (one, two)]
    for key in ("eval_loss", "tokens", "supervised_tokens", "steps"):
        assert results[1][key] == pytest.approx(results[0][key], rel=rel)
    expected, found = weights(one), weights(two)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def cut_back(run: Path, copy: Path, step: int) -> Path:
    """Copy a run as it was when it was killed after a checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    (copy / "result.json").unlink()
    for path in (copy / "checkpoints").glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    return copy


class TestAdamW:
    """One process, two ranks that share the weights, and each going on with what the other began."""

    @pytest.fixture(scope="class")
    def alone(self, tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        run = tmp_path_factory.mktemp("alone") / "run"
        ftune.train(values_of(tiny_model, rows, run, ranks=1, training=ADAMW))
        return run

    @pytest.fixture(scope="class")
    def shared(self, tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("shared")
        training = {**ADAMW, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        training |= {"sample_prompts": ["a brook"], "sample_max_new_tokens": 4, "gradient_checkpointing": True}
        values = values_of(tiny_model, rows, folder / "run", ranks=2, training=training)
        said = start(2, "train", written(folder, values), "--plain").stdout
        assert "fsdp over 2 ranks: this one holds 17.6 k of 35.2 k weights" in said
        return folder / "run"

    def test_split_weights_learn_what_whole_ones_do(self, alone: Path, shared: Path) -> None:
        equal_runs(alone, shared)

    def test_all_ranks_answer_the_prompts_together(self, shared: Path) -> None:
        answers = [json.loads(line) for line in (shared / "samples.jsonl").read_text().splitlines()]
        assert [answer["when"] for answer in answers] == ["before", "after"]

    def test_a_checkpoint_holds_whole_weights_and_state_in_parts(self, shared: Path) -> None:
        folder = shared / "checkpoints" / "checkpoint-2"
        names = {path.name for path in folder.iterdir()}
        assert {"model.safetensors", "optimizer-00000-of-00002.pt", "optimizer-00001-of-00002.pt"} <= names
        assert set(json.loads((folder / "manifest.json").read_text())) == names - {"manifest.json"}

    def test_one_process_goes_on_with_what_two_began(self, alone: Path, shared: Path, tmp_path: Path) -> None:
        copy = cut_back(shared, tmp_path / "run", 2)
        said = start(1, "resume", str(copy), "--plain").stdout
        assert "training.gradient_accumulation_steps = 4" in said
        equal_runs(alone, copy)

    def test_two_go_on_with_what_one_began(self, alone: Path, tmp_path: Path) -> None:
        copy = cut_back(alone, tmp_path / "run", 2)
        start(2, "resume", str(copy), "--set", "distributed.zero_stage=3", "--plain")
        equal_runs(alone, copy)

    @pytest.mark.slow
    @pytest.mark.parametrize("ranks", [2, 4])
    def test_others_go_on(self, ranks: int, alone: Path, shared: Path, tmp_path: Path) -> None:
        copy = cut_back(shared, tmp_path / "run", 4)
        start(ranks, "resume", str(copy), "--plain")
        equal_runs(alone, copy)

    @pytest.mark.slow
    def test_replicas_go_on_with_what_was_split(self, alone: Path, shared: Path, tmp_path: Path) -> None:
        copy = cut_back(shared, tmp_path / "run", 2)
        start(2, "resume", str(copy), "--set", "distributed.zero_stage=0", "--plain")
        equal_runs(alone, copy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "tuning"),
    [
        ({"optim": "adalomo", "learning_rate": 1e-2}, {}),
        ({"optim": "lomo", "learning_rate": 5e-2, "max_grad_norm": 1.0}, {}),
        ({"optim": "lomo", "learning_rate": 5e-2, "optim_args": {"clip_grad_norm_per_tensor": 0.1}}, {}),
        ({"optim": "adamw_fused_backward", "gradient_checkpointing": True}, {}),
        ({"optim": "schedule_free_adamw"}, {}),
        ({"optim": "adamw_torch", "learning_rate": 1e-2}, {"method": "lora"}),
        ({"optim": "lomo", "learning_rate": 5e-2}, {"method": "lora_and_full"}),
        ({"optim": "adamw_torch", "learning_rate": 1e-2}, {"method": "vera"}),
    ],
    ids=str,
)
def test_every_method_that_splits(
    training: dict[str, Any], tuning: dict[str, Any], tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    """Equal to one process, before and after two ranks' state went on in one."""
    one, two = tmp_path / "one", tmp_path / "two"
    ftune.train(values_of(tiny_model, rows, one, ranks=1, training=training, tuning=tuning))
    values = values_of(tiny_model, rows, two, ranks=2, training=training, tuning=tuning)
    start(2, "train", written(tmp_path, values), "--plain")
    equal_runs(one, two)
    copy = cut_back(two, tmp_path / "copy", 2)
    if plugin_accumulates(training):
        start(1, "resume", str(copy), "--plain")
        equal_runs(one, copy)


def plugin_accumulates(training: dict[str, Any]) -> bool:
    from ftune import plugin

    optimizer = plugin.optimizer(training["optim"])
    return optimizer.accumulates(optimizer.Options(**training.get("optim_args", {})))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "muon"])
def test_state_on_the_host_changes_no_bit(optim: str, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """With one process, and clipping, which has to come before gradients go to the host."""
    training = {"optim": optim, "max_grad_norm": 0.5, "save_strategy": "no"}
    for name, place in (("device", "none"), ("host", "cpu")):
        values = values_of(tiny_model, rows, tmp_path / name, ranks=1, training=training)
        ftune.train({**values, "distributed": {"offload_optimizer": place}})
    assert losses(tmp_path / "host") == losses(tmp_path / "device")
    assert same_bits(weights(tmp_path / "host"), weights(tmp_path / "device"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_with_state_on_the_host(stage: int, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ftune.train(values_of(tiny_model, rows, one, ranks=1, training=ADAMW))
    values = values_of(tiny_model, rows, two, ranks=2, training=ADAMW)
    values["distributed"] = {"zero_stage": stage, "offload_optimizer": "cpu"}
    start(2, "train", written(tmp_path, values), "--plain")
    equal_runs(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("tuning", [{}, {"method": "lora"}], ids=str)
def test_other_stages(stage: int, tuning: dict[str, Any], tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ftune.train(values_of(tiny_model, rows, one, ranks=1, training=ADAMW, tuning=tuning))
    values = values_of(tiny_model, rows, two, ranks=2, training=ADAMW, tuning=tuning)
    values["distributed"] = {"zero_stage": stage}
    start(2, "train", written(tmp_path, values), "--plain")
    equal_runs(one, two)
    copy = cut_back(two, tmp_path / "copy", 2)
    start(1, "resume", str(copy), "--plain")
    equal_runs(one, copy)


def test_what_cannot_be_split_is_refused_before_anything_is_loaded(
    tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    refused = {
        "sharding-optimizer": ({"optim": "muon"}, {}),
        "sharding-tuning": ({"optim": "adamw_torch"}, {"method": "hift"}),
    }
    for rule, (training, tuning) in refused.items():
        values = values_of(tiny_model, rows, tmp_path / "run", ranks=2, training=training, tuning=tuning)
        assert [problem.rule for problem in ftune.check(values) if problem.severity == "error"] == [rule]
