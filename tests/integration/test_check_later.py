"""What only the run can know of a recipe is told by the run, before it trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import recipe

_ROW = {"prompt": "Hello", "completion": " you."}


@pytest.fixture
def written(tiny_model: Path, tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(_ROW) + "\n") * 8, encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    changes = {"data": {"assistant_only_loss": False}, "training": {"max_steps": 1}}
    path.write_text(yaml.safe_dump(recipe(tiny_model, rows, tmp_path / "run", **changes)), encoding="utf-8")
    return path


def test_a_setting_that_the_rows_found_do_not_follow(written: Path, ftune: Callable[..., Any]) -> None:
    assert ftune("check", written).returncode == 0
    done = ftune("train", written)
    assert done.returncode == 2, done.stderr
    assert "assistant_only_loss would be ignored: `prompt_completion` rows do not follow it" in done.stderr
    assert "recipe.yaml:" in done.stderr


def test_check_refuses_the_directory_that_train_would(written: Path, ftune: Callable[..., Any]) -> None:
    kept = ["--set", "data.assistant_only_loss=true"]
    assert ftune("train", written, *kept).returncode == 0
    answers = [ftune(command, written, *kept) for command in ("check", "train")]
    assert [answer.returncode for answer in answers] == [5, 5]
    assert answers[0].stderr.startswith(answers[1].stderr.rstrip())
    assert "it holds another run" in answers[0].stderr
