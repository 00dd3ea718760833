"""The report as a user meets it: left by a run, written by the command, never in a run's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_runs import metrics, recipe, rows_file

import ftune
from ftune import report
from ftune.errors import Interrupted
from ftune.training.callbacks import StopOnRequest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("report")
    rows = rows_file(folder / "rows.jsonl", 16)
    settings = {"sample_prompts": ["<b>Hello</b>"], "sample_max_new_tokens": 4, "max_steps": 3}
    return recipe(tiny_model, rows, folder / "run", data={"eval": 0.25}, training=settings)


@pytest.fixture(scope="module")
def run(values: dict[str, Any]) -> Path:
    return Path(ftune.train(values).directory)


def test_a_finished_run_has_its_report(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    result = json.loads((run / "result.json").read_text())
    for name, value in result.items():
        assert value is None or name == "status" or f'id="figure-{name}" value="{value}"' in text, name
    assert "<h1>run</h1>" in text
    assert "&lt;b&gt;Hello&lt;/b&gt;" in text
    assert "<b>" not in text
    logged = sum("loss" in line for line in metrics(run))
    curve = text.partition('<g id="loss-loss">')[2].partition("clip-path")[0]
    assert curve.count("M ") + curve.count("L ") == logged == 3


def test_the_command_writes_it_anew(run: Path, ftune: Any) -> None:
    written = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    done = ftune("report", run)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run / 'report.html'}\n", "")
    assert (run / "report.html").read_bytes() == written


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, ftune: Any) -> None:
    done = ftune("report", tmp_path)
    assert done.returncode == 5
    assert "is not a run directory" in done.stderr
    assert "fix: name the training.output_dir of a run" in done.stderr


def test_an_interrupted_run_has_its_report(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopOnRequest, "_everywhere", lambda self, args: True)
    with pytest.raises(Interrupted):
        ftune.train(values, [f"training.output_dir={tmp_path / 'run'}"])
    assert '<p class="status interrupted">interrupted</p>' in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_report_that_fails_does_not_fail_the_run(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(directory: Path) -> Path:
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(report, "write", broken)
    result = ftune.train(values, [f"training.output_dir={tmp_path / 'run'}"])
    assert result.status == "finished"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    assert not (tmp_path / "run" / "report.html").exists()
    said = f"no report.html was written: no fonts; try again: ftune report {tmp_path / 'run'}\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--help",), ("report", "--help"), ("schema",)], ids=" ".join)
def test_other_commands_import_no_drawing(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ftune", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert {"matplotlib", "jinja2"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} == set()


def test_drawing_needs_no_torch(run: Path) -> None:
    code = f"import pathlib, sys; from ftune import report; report.write(pathlib.Path({str(run)!r}))"
    code += "; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
