"""Nothing is lost: killed, interrupted, full disk or damaged file, a run goes on to the same bits."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import losses, metrics, recipe, rows_file, same_bits, weights

import ftune
from ftune.errors import RunError

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 3,
    "save_total_limit": 2,
    "eval_strategy": "epoch",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}
TUNING = {"method": "lora", "r": 4, "lora_dropout": 0.2}
"""Dropout, so that random numbers count."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40)


def write_recipe(folder: Path, tiny_model: Path, rows: Path, name: str, **training: Any) -> Path:
    """Write a recipe file of a run with evaluation, dropout and checkpoints."""
    values = recipe(
        tiny_model,
        rows,
        folder / name,
        data={"eval": 0.1},
        tuning=TUNING,
        training={**SETTINGS, **training},
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path) -> Path:
    """Return the directory of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return Path(ftune.train(write_recipe(folder, tiny_model, rows, "whole")).directory)


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start ftune as its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ftune", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait until something is on the disk; False when the process ended first."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return condition()


def assert_same_run(directory: Path, whole: Path) -> None:
    """The same weights bit for bit, the same losses digit for digit, the same answers of the evaluation."""
    assert same_bits(weights(directory), weights(whole))
    assert losses(directory) == losses(whole)
    evaluations = [[line["eval_loss"] for line in metrics(run) if "eval_loss" in line] for run in (directory, whole)]
    assert evaluations[0] == evaluations[1]
    results = [json.loads((run / "result.json").read_text()) for run in (directory, whole)]
    for name in ("status", "steps", "train_loss", "eval_loss", "tokens", "supervised_tokens"):
        assert results[0][name] == results[1][name], name


MOMENTS = {
    "before the first step": lambda run: (run / "run.json").exists(),
    "between checkpoints": lambda run: (run / "checkpoints" / "checkpoint-8").exists(),
    "while a checkpoint is written": lambda run: (run / "checkpoints" / "checkpoint-8.partial").exists(),
    "while the model is written": lambda run: (run / "model.partial").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bits(
    moment: str, tmp_path: Path, tiny_model: Path, rows: Path, whole: Path
) -> None:
    directory = tmp_path / "run"
    process = start("train", write_recipe(tmp_path, tiny_model, rows, "run"))
    reached = wait_for(lambda: MOMENTS[moment](directory), process)
    process.kill()
    process.communicate()
    assert reached
    assert process.returncode == -signal.SIGKILL
    resumed = start("resume", directory)
    output, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output + errors
    assert not list(directory.rglob("*.partial"))
    assert_same_run(directory, whole)


def test_ctrl_c_saves_and_exits_130(tmp_path: Path, tiny_model: Path, rows: Path, whole: Path) -> None:
    directory = tmp_path / "run"
    process = start("train", write_recipe(tmp_path, tiny_model, rows, "run", save_strategy="no"))
    assert wait_for(lambda: (directory / "metrics.jsonl").exists() and len(metrics(directory)) > 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "ftune resume" in errors
    assert json.loads((directory / "result.json").read_text())["status"] == "interrupted"
    assert len(list((directory / "checkpoints").iterdir())) == 1
    resumed = start("resume", directory)
    resumed.communicate(timeout=120)
    assert resumed.returncode == 0
    assert_same_run(directory, whole)


def test_another_runs_directory_is_refused(tmp_path: Path, tiny_model: Path, rows: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    values = recipe(tiny_model, rows, whole)
    with pytest.raises(RunError, match="ftune resume"):
        ftune.train(values)
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize("kept", ["checkpoints", "metrics.jsonl", "model"])
def test_any_work_of_another_run_is_kept(kept: str, tmp_path: Path, tiny_model: Path, rows: Path, whole: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "copy")
    for work in {"checkpoints", "metrics.jsonl", "model"} - {kept}:
        shutil.rmtree(run / work) if (run / work).is_dir() else (run / work).unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="it holds another run"):
        ftune.train(recipe(tiny_model, rows, run))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_folder_of_other_files_is_refused(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="other files"):
        ftune.train(recipe(tiny_model, rows, tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_run_that_failed_before_its_first_step_gives_way(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    from ftune.errors import RecipeError

    wrong = recipe(tiny_model, rows, tmp_path / "run", tuning={"method": "lora", "target_modules": ["nothing_like_it"]})
    with pytest.raises(RecipeError, match="q_proj"):
        ftune.train(wrong)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    assert ftune.train(recipe(tiny_model, rows, tmp_path / "run", training={"max_steps": 1})).status == "finished"


def copied(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run as it was before its end."""
    run = shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(run / "model")
    (run / "result.json").unlink()
    return run


def resume(ftune_command: Any, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return ftune_command("resume", run, *more)  # type: ignore[no-any-return]


def test_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path, ftune: Any) -> None:
    run = copied(whole, tmp_path)
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    path = newest / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = resume(ftune, run)
    assert done.returncode == 0, done.stderr
    assert "is damaged (adapter_model.safetensors is not what was written)" in done.stdout
    assert (newest.with_name(newest.name + ".damaged") / path.name).read_bytes() == content
    assert path.read_bytes() != content
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("training.learning_rate=3e-3", "learning_rate"),
        ("training.per_device_train_batch_size=4", "per_device_train_batch_size"),
        ("tuning.r=8", "tuning.r"),
        ("training.seed=7", "seed"),
    ],
)
def test_what_was_learned_cannot_be_changed(whole: Path, tmp_path: Path, ftune: Any, change: str, named: str) -> None:
    done = resume(ftune, copied(whole, tmp_path), "--set", change)
    assert done.returncode == 5
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_changed_data_are_refused(whole: Path, tmp_path: Path, tiny_model: Path, ftune: Any, rows: Path) -> None:
    mine = shutil.copy(rows, tmp_path / "rows.jsonl")
    values = recipe(
        tiny_model, mine, tmp_path / "run", training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert ftune("train", path).returncode == 0
    with mine.open("a") as file:
        file.write(mine.read_text().splitlines()[0] + "\n")
    done = resume(ftune, tmp_path / "run", "--set", "training.max_steps=6")
    assert done.returncode == 5
    assert "has changed since the run began" in done.stderr


def test_a_finished_run_can_be_prolonged(whole: Path, tmp_path: Path, ftune: Any) -> None:
    run = shutil.copytree(whole, tmp_path / "copy")
    assert resume(ftune, run).returncode == 5
    process = start("resume", run, "--set", "training.num_train_epochs=6", "--set", "training.logging_steps=1")
    assert wait_for(lambda: (run / "checkpoints" / "checkpoint-36").exists(), process)
    process.kill()
    process.communicate()
    done = resume(ftune, run)  # the wish to go on longer is part of the run now
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["steps"] == 54
    rates = {line["step"]: line["learning_rate"] for line in metrics(run) if "learning_rate" in line}
    # Warmup over 6 of 54 steps, then half a cosine: the longer schedule counts from the first step on.
    assert rates[28] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * (27 - 6) / 48)), rel=1e-9)


@pytest.mark.parametrize("name", ["notes.txt", "thesis.partial", "checkpoints/notes.txt", "checkpoints/notes.partial"])
def test_a_file_of_the_users_is_never_deleted(name: str, tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    from ftune.errors import RecipeError

    values = recipe(
        tiny_model, rows, tmp_path / "run", tuning={"method": "lora", "target_modules": ["nothing_like_it"]}
    )
    with pytest.raises(RecipeError):
        ftune.train(values)
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(RunError, match=re.escape(name)):
        ftune.train(recipe(tiny_model, rows, tmp_path / "run"))
    assert (tmp_path / "run" / name).read_text() == "mine"
    assert (tmp_path / "run" / "run.json").exists()


def killed_copy(run: Path, target: Path, step: int) -> Path:
    """Return a copy of a run as a kill after one of its checkpoints leaves it."""
    copy = shutil.copytree(run, target)
    shutil.rmtree(copy / "model")
    (copy / "result.json").unlink()
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    return copy


CASES: dict[str, dict[str, Any]] = {
    "the best, moved": {"load_best_model_at_end": True, "eval_steps": 1, "learning_rate": 0.05},
    "early stopping": {
        "early_stopping_patience": 2,
        "early_stopping_threshold": 0.05,
        "eval_steps": 1,
        "learning_rate": 0.05,
    },
    "a constant rate to the middle of an epoch": {"lr_scheduler_type": "constant", "max_steps": 11},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("last", [False, True])
def test_what_else_a_run_remembers(name: str, last: bool, tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    from ftune.machine import probe
    from ftune.training import resuming
    from ftune.training.run import train

    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
        "num_train_epochs": 3,
        "sample_prompts": ["What is a brook?"],
        "sample_max_new_tokens": 4,
        **CASES[name],
    }
    values = recipe(tiny_model, rows, tmp_path / "run", data={"eval": str(rows)}, tuning=TUNING, training=settings)
    run = Path(ftune.train(values).directory)
    steps = json.loads((run / "result.json").read_text())["steps"]
    assert (steps < 11) == (name == "early stopping")
    copy = killed_copy(run, tmp_path / "elsewhere", steps if last else steps - 1)
    continued = resuming.reopen(copy, (), probe())
    train(continued.spec, plain=True, checkpoint=continued.checkpoint)
    assert_same_run(copy, run)
    results = [json.loads((one / "result.json").read_text()) for one in (copy, run)]
    assert results[0]["best_checkpoint"] == results[1]["best_checkpoint"]
    assert (copy / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()


def test_new_intervals_hold_from_the_resume_on(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    from ftune.machine import probe
    from ftune.training import resuming
    from ftune.training.run import train

    settings = {"eval_steps": 5, "logging_steps": 5, "save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    settings |= {"save_total_limit": None}
    run = Path(ftune.train(recipe(tiny_model, rows, tmp_path / "run", data={"eval": 0.1}, training=settings)).directory)
    copy = killed_copy(run, tmp_path / "copy", 4)
    changes = [f"training.{name}" for name in ("logging_steps=2", "eval_steps=3", "save_steps=1")]
    continued = resuming.reopen(copy, changes, probe())
    train(continued.spec, plain=True, checkpoint=continued.checkpoint)
    lines = metrics(copy)
    assert [line["step"] for line in lines if "loss" in line] == [1, 6, 8, 10]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 9, 10]
    found = sorted(int(path.name.rpartition("-")[2]) for path in (copy / "checkpoints").iterdir())
    assert found == list(range(4, 11))


def test_a_stream_goes_on_in_its_second_pass(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    from ftune.machine import probe
    from ftune.training import resuming
    from ftune.training.run import train

    settings = {"max_steps": 14, "save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    data = {"streaming": True, "shuffle_buffer_size": 8}
    run = Path(ftune.train(recipe(tiny_model, rows, tmp_path / "run", data=data, training=settings)).directory)
    copy = killed_copy(run, tmp_path / "copy", 12)
    continued = resuming.reopen(copy, (), probe())
    train(continued.spec, plain=True, checkpoint=continued.checkpoint)
    assert_same_run(copy, run)


def test_held_out_rows_stay_held_out(whole: Path, tmp_path: Path, ftune: Any) -> None:
    done = resume(ftune, copied(whole, tmp_path), "--set", "data.eval=0.25")
    assert done.returncode == 5
    assert "data.eval" in done.stderr


def test_resume_of_nothing(tmp_path: Path, ftune: Any) -> None:
    done = ftune("resume", tmp_path)
    assert done.returncode == 5
    assert "is not a run directory" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root can mount a small disk")
class TestFullDisk:
    """On a real file system of a few megabytes."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Any:
        mount = tmp_path / "disk"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=True)
        yield mount
        subprocess.run(["umount", str(mount)], check=True)

    def test_no_room_is_known_before_the_first_step(self, disk: Path, make_tiny: Any, rows: Path, ftune: Any) -> None:
        big = make_tiny(disk.parent / "big", hidden_size=256, intermediate_size=512)
        values = recipe(big, rows, disk / "run", training={"save_strategy": "epoch"})
        path = disk.parent / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        done = ftune("train", path)
        assert done.returncode == 3, done.stderr
        assert "save_total_limit" in done.stderr
        assert not (disk / "run" / "metrics.jsonl").exists()

    def test_a_disk_that_fills_up_keeps_what_was_saved(
        self, disk: Path, tiny_model: Path, rows: Path, whole: Path, ftune: Any
    ) -> None:
        process = start("train", write_recipe(disk.parent, tiny_model, rows, "disk/run"))
        run = disk / "run"
        assert wait_for(lambda: (run / "checkpoints" / "checkpoint-8").exists(), process)
        filler = disk / "filler"
        with filler.open("wb") as file:
            left = shutil.disk_usage(disk).free - 50_000
            file.write(b"x" * left)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 5, errors
        assert "Traceback" not in errors
        assert "free the disk" in errors
        assert not list(run.rglob("*.partial"))
        filler.unlink()
        done = ftune("resume", run)
        assert done.returncode == 0, done.stderr
        assert_same_run(run, whole)
