"""Ctrl-C and SIGTERM while a run loads, and what is left of how a run ended before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from training_runs import recipe, rows_file

import ftune
from ftune.errors import RecipeError
from ftune.machine import probe
from ftune.training import resuming
from ftune.training.run import train

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_loads_stops_at_once(number: int, tmp_path: Path, tiny_model: Path) -> None:
    """What loads for long here is the model's own Python code."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "slow.SlowConfig"}}))
    (model / "slow.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    rows = rows_file(tmp_path / "rows.jsonl", 8)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(model, rows, tmp_path / "run", model={"trust_remote_code": True})))
    process = subprocess.Popen(
        [sys.executable, "-m", "ftune", "train", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "loading\n":
            break
    began = time.perf_counter()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert time.perf_counter() - began < 30
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped at once" in errors
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"


def test_the_report_of_before_does_not_outlive_a_failure(tmp_path: Path, tiny_model: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    rows = rows_file(tmp_path / "rows.jsonl", 8)
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    home = Path(ftune.train(recipe(model, rows, tmp_path / "run", training=training)).directory)
    assert 'class="status finished"' in (home / "report.html").read_text()
    for name in ("result.json", "model"):
        path = home / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (model / "config.json").unlink()
    continued = resuming.reopen(home, (), probe())
    with pytest.raises(RecipeError):
        train(continued.spec, plain=True, checkpoint=continued.checkpoint)
    assert json.loads((home / "result.json").read_text())["status"] == "failed"
    assert 'class="status failed"' in (home / "report.html").read_text()
