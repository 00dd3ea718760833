"""Launches of two real ranks on the processor: how they end, and what each failure says first."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from launches import Launch, written
from training_runs import losses, recipe, rows_file, weights

import ftune
from ftune.training import checkpoint

ROWS = 80
MINUTE = 60.0
TWO = ("--gpus", "2", "--cpu")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    """Return a function that launches `ftune WORDS`; whatever a failed test leaves is ended."""
    begun: list[Launch] = []

    def launch(*words: str, **environment: str) -> Launch:
        begun.append(Launch(words, tmp_path / f"output-{len(begun)}.txt", **environment))
        return begun[-1]

    yield launch
    for one in begun:
        one.clear()


@pytest.fixture
def values(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Return a recipe that logs and saves often; one process of twice the batch learns the same."""
    return recipe(tiny_model, rows_file(tmp_path / "rows.jsonl", ROWS), tmp_path / "run", training=SETTINGS)


SETTINGS = {"optim": "sgd", "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}


def equals_one_process(values: dict[str, Any], run: Path, folder: Path) -> None:
    """Hold a run of two ranks against one process."""
    training = {**values["training"], "per_device_train_batch_size": 4, "output_dir": str(folder / "alone")}
    alone = ftune.train({**values, "training": training})
    assert losses(run) == pytest.approx(losses(alone.directory), rel=1e-5)
    for name, weight in weights(alone.directory).items():
        assert weights(run)[name].allclose(weight, rtol=1e-5, atol=1e-6), name


def checkpoints_are_whole(run: Path) -> None:
    folders = sorted((run / "checkpoints").iterdir())
    assert folders
    assert [(folder.name, checkpoint.damage(folder)) for folder in folders if checkpoint.damage(folder)] == []


def failed(run: Path, what: str) -> None:
    """Hold the result of a run against what it failed of first."""
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "failed"
    assert what in result["message"]


def stopped(launch: Launch, run: Path) -> int:
    """Hold the end of a launch that was asked to stop against what it has saved; return the step."""
    assert launch.end() == 130, launch.text()
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert f"stopped at step {result['steps']}; saved checkpoint-{result['steps']}" in launch.text()
    assert (run / "checkpoints" / f"checkpoint-{result['steps']}").is_dir()
    assert "Traceback" not in launch.text()
    assert launch.left_over() == []
    checkpoints_are_whole(run)
    return int(result["steps"])


def killed(launch: Launch, run: Path) -> None:
    """Kill a rank, and hold the end of its launch against that."""
    launch.rank(1).kill()
    assert launch.end(MINUTE) == 5
    text = launch.text()
    assert "error: rank 1 on" in text
    assert "killed by signal 9 (SIGKILL)" in text
    assert f"ftune resume {run} --gpus 2 --cpu" in text
    assert "Traceback" not in text
    assert launch.left_over() == []
    failed(run, "killed by signal 9")
    checkpoints_are_whole(run)


def test_a_stop_is_saved_and_a_killed_rank_is_told(
    values: dict[str, Any], start: Callable[..., Launch], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    values["training"]["num_train_epochs"] = 500
    launch = start("launch", str(written(tmp_path, values)), *TWO)
    launch.wait_for_step(run, 2)
    launch.process.send_signal(signal.SIGINT)
    step = stopped(launch, run)
    assert "preflight: 2 ranks on" in launch.text()
    again = start("resume", str(run), *TWO)
    again.wait_for_step(run, step + 1)
    assert f"going on from checkpoint-{step}" in again.text()
    killed(again, run)


@pytest.mark.slow
def test_sigterm_is_a_stop(values: dict[str, Any], start: Callable[..., Launch], tmp_path: Path) -> None:
    values["training"]["num_train_epochs"] = 500
    launch = start("launch", str(written(tmp_path, values)), *TWO)
    launch.wait_for_step(tmp_path / "run", 2)
    launch.process.send_signal(signal.SIGTERM)
    stopped(launch, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_rank_and_on_from_the_last_checkpoint(
    values: dict[str, Any], start: Callable[..., Launch], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launch = start("launch", str(written(tmp_path, values)), *TWO)
    launch.wait_for_step(run, 4)
    killed(launch, run)
    again = start("resume", str(run), *TWO)
    assert again.end() == 0, again.text()
    assert "going on from checkpoint-3" in again.text()
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
    equals_one_process(values, run, tmp_path)


@pytest.mark.slow
def test_a_lost_rank_is_started_again(values: dict[str, Any], start: Callable[..., Launch], tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = start("launch", str(written(tmp_path, values)), *TWO, "--max-restarts", "1")
    launch.wait_for_step(run, 4)
    launch.rank(0).kill()
    assert launch.end() == 0, launch.text()
    assert "killed by signal 9 (SIGKILL); starting again" in launch.text()
    assert "starting again from the last checkpoint (1 of 1)" in launch.text()
    assert launch.left_over() == []
    equals_one_process(values, run, tmp_path)


@pytest.mark.slow
def test_the_second_request_ends_it_at_once(
    values: dict[str, Any], start: Callable[..., Launch], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    values["training"] |= {"num_train_epochs": 500, "gradient_accumulation_steps": 40}
    launch = start("launch", str(written(tmp_path, values)), *TWO)
    launch.wait_for_step(run, 1)
    launch.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    launch.process.send_signal(signal.SIGINT)
    assert launch.end(MINUTE) == 130
    assert launch.left_over() == []


@pytest.mark.slow
def test_a_stop_while_it_starts(values: dict[str, Any], start: Callable[..., Launch], tmp_path: Path) -> None:
    launch = start("launch", str(written(tmp_path, values)), *TWO)
    end = time.monotonic() + MINUTE
    while not any("ftune.ranks.agent" in process.cmdline() for process in launch.look()):
        assert time.monotonic() < end, launch.text()
        time.sleep(0.05)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end(MINUTE) == 130
    assert "stopped at once, without saving" in launch.text()
    assert launch.left_over() == []


FAULT = """\
import os, time
from transformers import LlamaForCausalLM

class Faulty(LlamaForCausalLM):
    calls = 0

    def forward(self, *arguments, **named):
        Faulty.calls += 1
        if os.environ.get("RANK") == "1" and Faulty.calls == 5:
            {fault}
        return super().forward(*arguments, **named)
"""


def faulty(values: dict[str, Any], tiny_model: Path, folder: Path, fault: str) -> dict[str, Any]:
    """Return a recipe whose model brings Python code of its own, which does something in rank 1."""
    model = shutil.copytree(tiny_model, folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "faulty.Faulty"}}))
    (model / "faulty.py").write_text(FAULT.format(fault=fault))
    return {**values, "model": {"model_name_or_path": str(model), "trust_remote_code": True}}


@pytest.mark.slow
def test_a_rank_that_raises(
    values: dict[str, Any], tiny_model: Path, start: Callable[..., Launch], tmp_path: Path
) -> None:
    made = faulty(values, tiny_model, tmp_path, "raise ZeroDivisionError('of rank 1 alone')")
    launch = start("launch", str(written(tmp_path, made)), *TWO, HF_HOME=str(tmp_path / "cache"))
    assert launch.end() == 1
    text = launch.text()
    assert "rank 1 on" in text
    assert "ZeroDivisionError: of rank 1 alone" in text
    assert "this is a bug in ftune" in text
    assert launch.left_over() == []
    failed(tmp_path / "run", "of rank 1 alone")
    checkpoints_are_whole(tmp_path / "run")


@pytest.mark.slow
def test_a_rank_that_does_not_come(
    values: dict[str, Any], tiny_model: Path, start: Callable[..., Launch], tmp_path: Path
) -> None:
    made = faulty(values, tiny_model, tmp_path, "time.sleep(3600)")
    words = ("launch", str(written(tmp_path, made)), *TWO)
    launch = start(*words, HF_HOME=str(tmp_path / "cache"))
    launch.wait_for_step(tmp_path / "run", 4)
    assert launch.end(MINUTE) == 5
    text = launch.text()
    assert "error: rank 1 on" in text
    assert "did not come to where the other ranks wait" in text
    assert "rank 1 is in forward (" in text
    assert "faulty.py:" in text
    assert "Traceback" not in text
    assert launch.left_over() == []
    failed(tmp_path / "run", "rank 1 on")


@pytest.mark.slow
def test_a_stopped_rank(values: dict[str, Any], start: Callable[..., Launch], tmp_path: Path) -> None:
    values["training"]["num_train_epochs"] = 500
    launch = start("launch", str(written(tmp_path, values)), *TWO)
    launch.wait_for_step(tmp_path / "run", 4)
    launch.rank(1).suspend()
    assert launch.end(MINUTE) == 5
    assert "rank 1 is stopped in" in launch.text()
    assert launch.left_over() == []
    checkpoints_are_whole(tmp_path / "run")


@pytest.mark.slow
def test_a_full_disk_on_one_rank(values: dict[str, Any], start: Callable[..., Launch], tmp_path: Path) -> None:
    """A limit on the size of its files, set while it trains: the first checkpoint after it cannot be written."""
    values["training"]["num_train_epochs"] = 500
    launch = start("launch", str(written(tmp_path, values)), *TWO)
    launch.wait_for_step(tmp_path / "run", 4)
    resource.prlimit(launch.rank(1).pid, resource.RLIMIT_FSIZE, (2048, 2048))
    assert launch.end(MINUTE) == 5
    text = launch.text()
    assert "error: the disk is full" in text or "error: could not write checkpoint" in text
    assert "Traceback" not in text
    assert launch.left_over() == []
    failed(tmp_path / "run", "disk")
    checkpoints_are_whole(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["launcher", "agent"])
def test_no_rank_outlives_those_who_watch_it(
    who: str, values: dict[str, Any], start: Callable[..., Launch], tmp_path: Path
) -> None:
    values["training"]["num_train_epochs"] = 500
    launch = start("launch", str(written(tmp_path, values)), *TWO)
    launch.wait_for_step(tmp_path / "run", 2)
    launch.look()
    victim = psutil.Process(launch.process.pid) if who == "launcher" else launch.agent()
    victim.kill()
    code = launch.end(MINUTE)
    assert code == (-signal.SIGKILL if who == "launcher" else 5)
    assert launch.left_over(30) == []


@pytest.mark.slow
def test_the_hosts_alone(values: dict[str, Any], start: Callable[..., Launch], tmp_path: Path) -> None:
    launch = start("doctor", "--launch", str(written(tmp_path, values)), *TWO)
    assert launch.end() == 0, launch.text()
    assert "preflight: 2 ranks on" in launch.text()
    assert "an all-reduce moves" in launch.text()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.preflight").exists()


@pytest.mark.slow
def test_the_commands_of_a_dry_run_train(values: dict[str, Any], ftune: Callable[..., Any], tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    values["training"] |= {"max_steps": 2, "save_strategy": "no"}
    printed = ftune("launch", written(tmp_path, values), *TWO, "--dry-run")
    assert printed.returncode == 0, printed.stderr
    assert not (tmp_path / "run").exists()
    script = printed.stdout.replace("\nftune ", f"\n{sys.executable} -m ftune ")
    done = subprocess.run(
        ["sh", "-e"], input=script, env={**os.environ}, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
