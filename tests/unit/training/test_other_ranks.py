"""What another number of ranks takes in a step: the rows that the step has always had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftune.errors import RunError
from ftune.machine import Machine
from ftune.recipe import load
from ftune.resolve import RunSpec, resolve
from ftune.training.checkpoint import STATE
from ftune.training.other_ranks import for_ranks

_PACKAGES = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"), "1")


def spec_of(**training: Any) -> RunSpec:
    values = {
        "model": {"model_name_or_path": "org/model"},
        "data": {"train": "rows.jsonl"},
        "training": {"output_dir": "runs/x", "max_steps": 9, **training},
    }
    return resolve(load(values), Machine(packages=_PACKAGES), fingerprints=False)


def checkpoint(folder: Path, *, ranks: int, rows: int) -> Path:
    (folder / STATE).write_text(json.dumps({"ranks": ranks, "rows_per_step": rows}))
    return folder


@pytest.mark.parametrize("before", [1, 2, 3, 8])
@pytest.mark.parametrize("now", [1, 2, 4, 6])
@pytest.mark.parametrize(("size", "passes"), [(4, 1), (3, 2), (6, 4)])
def test_a_step_keeps_its_rows(before: int, now: int, size: int, passes: int, tmp_path: Path) -> None:
    spec = spec_of(per_device_train_batch_size=size, gradient_accumulation_steps=passes)
    rows = before * size * passes
    found = checkpoint(tmp_path, ranks=before, rows=rows)
    if rows % now:
        with pytest.raises(RunError) as refused:
            for_ranks(spec, found, now)
        assert refused.value.problems[0].rule == "resume-ranks"
        return
    changed, said = for_ranks(spec, found, now)
    training = changed.recipe.training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * now == rows
    assert training.per_device_train_batch_size <= size  # more may not fit
    assert changed.training_arguments["gradient_accumulation_steps"] == training.gradient_accumulation_steps
    assert changed.training_arguments["per_device_train_batch_size"] == training.per_device_train_batch_size
    assert bool(said) == (before != now)
    # And when those go on again that there were.
    again = for_ranks(changed, found, before)[0].recipe.training
    assert again.per_device_train_batch_size * again.gradient_accumulation_steps * before == rows


@pytest.mark.parametrize("settings", [{"group_by_length": True}, {"optim": "lomo"}], ids=str)
def test_what_cannot_keep_its_rows_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(per_device_train_batch_size=2, **settings)
    found = checkpoint(tmp_path, ranks=4, rows=8)
    assert for_ranks(spec, found, 4) == (spec, [])
    with pytest.raises(RunError) as refused:
        for_ranks(spec, found, 2)
    assert "ftune resume RUN_DIR --gpus 4" in str(refused.value)


def test_a_checkpoint_of_before_says_its_ranks_alone(tmp_path: Path) -> None:
    spec = spec_of(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    (tmp_path / STATE).write_text(json.dumps({"ranks": 2}))
    changed, _ = for_ranks(spec, tmp_path, 1)
    assert changed.recipe.training.gradient_accumulation_steps == 6
