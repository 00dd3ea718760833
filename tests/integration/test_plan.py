"""`ftune plan` as a user runs it: what it answers, and what it says where it cannot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from training_runs import recipe, rows_file

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a recipe whose rows do not exist."""

    def write(model: str, **training: Any) -> Path:
        values = recipe(Path("x"), tmp_path / "rows.jsonl", tmp_path / "run", training=training)
        values["model"]["model_name_or_path"] = model
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_the_answer_as_json(ftune: Run, written: Any, tiny_model: Path) -> None:
    path = written(str(tiny_model), max_steps=10, save_strategy="steps", save_steps=5, optim="adamw_torch")
    done = ftune("plan", path, "--gpu", "24GiB", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert sum(plan["parts"].values()) == plan["peak_bytes"]
    assert plan["peak_bytes"] - plan["parts"]["overhead"] == plan["live_bytes"]
    assert plan["live_bytes"] <= plan["allocated_bytes"] < plan["peak_bytes"] < plan["high_bytes"]
    assert plan["capacity_bytes"] == 24 * 1024**3
    assert (plan["fits"], plan["tight"]) == (True, False)
    assert plan["seconds_per_step"] is None  # a size has no speed
    assert plan["tokens_per_step"] == 4 * 250
    # 260 x 32 twice, and two layers of 32 x (32 + 2 x 16 + 32) + 3 x 32 x 64 + 2 x 32, and a norm of 32.
    weights = 4 * (2 * 260 * 32 + 2 * (32 * 96 + 3 * 32 * 64 + 64) + 32)
    assert plan["parts"]["weights"] == weights
    # Two checkpoints with two moments, and the result.
    assert plan["disk_bytes"] == pytest.approx(2 * 3 * weights + weights, rel=0.01)


def test_rows_that_are_left_to_the_plan(ftune: Run, written: Any, tiny_model: Path, tmp_path: Path) -> None:
    rows_file(tmp_path / "rows.jsonl", 5)
    path = written(str(tiny_model), per_device_train_batch_size="auto", gradient_accumulation_steps=2)
    checked = ftune("check", path)
    assert "training.per_device_train_batch_size = auto" in checked.stdout
    done = ftune("plan", path, "--gpu", "24GiB", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["tokens_per_step"] == 16 * 250
    assert {one["key"].rpartition(".")[2]: one["value"] for one in plan["decisions"]} == {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
    }
    assert "all 16 rows of a step fit at once" in plan["decisions"][0]["why"]


def test_the_page(ftune: Run, written: Any, tiny_model: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "plan.html"
    path = written(str(tiny_model), gradient_accumulation_steps=2, optim="adamw_torch")
    done = ftune("plan", path, "--gpu", "24GiB", "--json", "--html", page)
    assert done.returncode == 0, done.stderr
    plan, text = json.loads(done.stdout), page.read_text()
    for size in (*plan["parts"].values(), *plan["phases"].values(), plan["peak_bytes"]):
        assert not size or f">{size:,}<" in text
    assert f"{plan['live_bytes'] / 2**20:.1f} MiB at the peak" in text
    assert text.count(">forward<") >= 1
    # Nothing is loaded from anywhere, and nothing may be.
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)=\"(?!#)|url\((?!#)|@import", text)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser to open the page in")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    opened = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert opened.count("<svg") == 1
    assert opened.count('id="live-area-') >= sum(bool(size) for size in plan["parts"].values()) - 1


def test_a_page_shows_one_plan(ftune: Run, written: Any, tiny_model: Path, tmp_path: Path) -> None:
    done = ftune("plan", written(str(tiny_model)), "--gpu", "24GiB", "--fit", "--html", tmp_path / "plan.html")
    assert done.returncode == 2
    assert "--html shows one plan" in done.stderr
    assert not (tmp_path / "plan.html").exists()


def test_a_trace_that_takes_too_long_is_ended(ftune: Run, written: Any, tiny_model: Path) -> None:
    done = ftune("plan", written(str(tiny_model)), "--gpu", "24GiB", "--timeout", "0.01")
    assert done.returncode == 5
    assert "took longer than 0.01 s" in done.stderr
    assert "allow more with --timeout SECONDS" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_does_not_fit_exits_with_3(ftune: Run, written: Any, tiny_model: Path) -> None:
    done = ftune("plan", written(str(tiny_model)), "--gpu", "100MiB")
    assert done.returncode == 3
    assert "it does not fit: a GPU with 100MiB has 100.0 MiB" in done.stdout


@pytest.mark.parametrize(
    ("gpu", "said"),
    [("rtx4091", "NVIDIA GeForce RTX 4090"), ("v100", "Tesla V100-SXM2-32GB"), ("", "--gpu 24GiB always works")],
)
def test_a_gpu_that_is_none(ftune: Run, written: Any, tiny_model: Path, gpu: str, said: str) -> None:
    done = ftune("plan", written(str(tiny_model)), "--gpu", gpu)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("meta-lama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("nobody/knows-this", "A directory with the model's config.json always works"),
    ],
)
def test_a_model_that_is_nowhere(ftune: Run, written: Any, model: str, said: str) -> None:
    done = ftune("plan", written(model), "--gpu", "24GiB")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "novel"}, "is of no architecture that transformers has"),
        ({"model_type": "novel", "auto_map": {"AutoConfig": "x.Y"}}, "brings its own code, and a plan runs none"),
        ({}, "does not say its model_type"),
    ],
)
def test_an_architecture_that_cannot_be_followed(
    ftune: Run, written: Any, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = ftune("plan", written(str(tmp_path / "model")), "--gpu", "24GiB")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
