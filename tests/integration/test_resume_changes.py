"""What a run that goes on may change, what it says of it, and when there is nothing left to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_runs import metrics, recipe, rows_file

import ftune
from ftune.errors import FtuneError, RecipeError, RunError
from ftune.machine import probe
from ftune.training import resuming
from ftune.training.run import train

TRAINING: dict[str, Any] = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 16)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path) -> Path:
    """Return the directory of a run of six steps, four to an epoch; do not write into it."""
    home = tmp_path_factory.mktemp("finished") / "run"
    settings = {**TRAINING, "max_steps": 6}
    return Path(ftune.train(recipe(tiny_model, rows, home, training=settings)).directory)


def refused(directory: Path, *changes: str) -> FtuneError:
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(FtuneError) as caught:
        resuming.reopen(directory, changes, probe())
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    return caught.value


def test_a_run_stays_in_its_directory(finished: Path) -> None:
    error = refused(finished, "training.max_steps=8", " training.output_dir = elsewhere")
    assert error.problems[0].rule == "resume-changed"
    assert "output_dir" in error.problems[0].why


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ((), ""),
        (("training.num_train_epochs=50",), "training.max_steps: 6 decides"),
        (("training.max_steps=5",), "it took 6 steps"),
        (("training.logging_steps=3",), "it took 6 steps"),
        (("training.max_steps=-1", "training.num_train_epochs=1.5"), "it took 6 steps"),
    ],
    ids=str,
)
def test_a_finished_run_with_nothing_more_to_do(finished: Path, changes: tuple[str, ...], words: str) -> None:
    error = refused(finished, *changes)
    assert error.problems[0].rule == "resume-finished"
    assert words in error.problems[0].why
    key = "num_train_epochs" if "training.max_steps=-1" in changes else "max_steps"
    assert f"--set training.{key}=N" in error.problems[0].fix


@pytest.mark.parametrize(
    "changes", [["training.max_steps=7"], ["training.max_steps=-1", "training.num_train_epochs=2"]]
)
def test_a_finished_run_with_more_to_do(finished: Path, tmp_path: Path, changes: list[str]) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    continued = resuming.reopen(copy, changes, probe())
    assert continued.checkpoint is not None
    assert not (copy / "report.html").exists()
    assert train(continued.spec, plain=True, checkpoint=continued.checkpoint).steps == 7 + len(changes) - 1


def test_a_run_that_stopped_early_is_finished(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    training = {**TRAINING, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 1}
    training |= {"early_stopping_threshold": 9.0, "num_train_epochs": 5}
    run = ftune.train(recipe(tiny_model, rows, tmp_path / "run", data={"eval": str(rows)}, training=training))
    assert run.steps < 20
    error = refused(tmp_path / "run", "training.num_train_epochs=9")
    assert f"stopped early, after {run.steps} steps" in error.problems[0].why


def test_the_rules_have_their_say_on_changes(finished: Path, tmp_path: Path) -> None:
    """What `check` would say of the recipe with the change in it, and nothing where nothing is changed."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    change = ["training.max_steps=8", "training.num_train_epochs=3"]
    expected = {problem.what for problem in ftune.check(copy / "recipe.yaml", change) if problem.severity != "error"}
    assert expected
    notes = resuming.reopen(copy, change, probe()).notes
    for what in expected:
        assert any(what in note and note.startswith(("warning: ", "note: ")) for note in notes), what


def test_a_run_file_that_is_none_is_told_alike(finished: Path, tmp_path: Path, ftune: Callable[..., Any]) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    values = json.loads((copy / "run.json").read_text())
    values["recipe"]["objective"] = "sft"
    (copy / "run.json").write_text(json.dumps(values))
    (copy / "result.json").unlink()
    told = [ftune(*command) for command in (("chat", copy, "--prompt", "x"), ("resume", copy))]
    assert [done.returncode for done in told] == [5, 5]
    assert "cannot be read" in told[0].stderr
    assert told[0].stderr == told[1].stderr


def test_a_finished_run_in_the_way_says_what_can_be_done(finished: Path, tiny_model: Path, rows: Path) -> None:
    with pytest.raises(RunError) as caught:
        ftune.train(recipe(tiny_model, rows, finished))
    fix = caught.value.problems[0].fix
    for words in (f"ftune chat {finished}", f"ftune resume {finished} --set training.", "training.output_dir"):
        assert words in fix


def test_an_output_directory_that_can_be_none(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    from ftune.machine import Machine
    from ftune.recipe import load
    from ftune.resolve import resolve
    from ftune.training import directory

    spec = resolve(load(recipe(tiny_model, rows, tmp_path / "run")), Machine(), fingerprints=False)
    training = spec.recipe.training.model_copy(update={"output_dir": str(tmp_path / ("x" * 300))})
    with pytest.raises(RecipeError) as caught:
        directory.create(replace(spec, recipe=replace(spec.recipe, training=training)))
    assert caught.value.problems[0].rule == "bad-path"


def test_a_run_at_its_end_is_evaluated_as_it_was(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """In the 16 bits that it trained in, whether the model was prepared for training or not."""
    training = {**TRAINING, "max_steps": 4, "bf16": True, "eval_strategy": "no"}
    data = {"eval": str(rows)}
    run = Path(ftune.train(recipe(tiny_model, rows, tmp_path / "run", data=data, training=training)).directory)
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "model")
    (copy / "result.json").unlink()
    continued = resuming.reopen(copy, (), probe())
    train(continued.spec, plain=True, checkpoint=continued.checkpoint)
    ends = [json.loads((one / "result.json").read_text())["eval_loss"] for one in (run, copy)]
    assert ends[0] == ends[1]
    assert [line["eval_loss"] for line in metrics(run) if "eval_loss" in line][-1] == ends[0]
    plain = {**training, "bf16": False, "learning_rate": 1e-9, "max_steps": 1}
    wide = Path(ftune.train(recipe(tiny_model, rows, tmp_path / "wide", data=data, training=plain)).directory)
    assert metrics(wide)[0]["eval_loss"] != metrics(run)[0]["eval_loss"]


def test_answers_are_given_in_the_bits_of_training(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from ftune.training import samples

    asked: list[bool] = []
    answers = samples.generate_answers

    def spy(*arguments: Any, **named: Any) -> list[str]:
        asked.append(torch.is_autocast_enabled("cpu"))
        return answers(*arguments, **named)

    monkeypatch.setattr(samples, "generate_answers", spy)
    training = {"max_steps": 1, "bf16": True, "sample_prompts": ["Hello"], "sample_max_new_tokens": 2}
    ftune.train(recipe(tiny_model, rows, tmp_path / "run", training=training))
    assert asked == [True, True]
