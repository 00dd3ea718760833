"""Run directories made by hand: what a finished run leaves, without the training."""

from __future__ import annotations

import json
from pathlib import Path

from ftune import rundir
from ftune.recipe.schema import Recipe
from ftune.resolve.spec import RunSpec


def write_run(directory: Path, model: Path) -> Path:
    """Write the files of a run, but for its model."""
    recipe = {
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "data": {"train": "none.jsonl"},
        "objective": {"method": "sft"},
        "tuning": {"method": "lora"},
        "training": {"output_dir": str(directory)},
        "distributed": {},
    }
    spec = RunSpec(
        recipe=Recipe.from_dict(recipe),
        training_arguments={},
        decisions=(),
        recipe_text="",
        overrides=(),
        data_fingerprint={},
        versions={},
        device_type="cpu",
        ftune_version="0",
    )
    directory.mkdir()
    (directory / rundir.RUN).write_text(spec.to_json(), encoding="utf-8")
    prompts = ["Say hello", [{"role": "user", "content": "Say bye"}], "Say hello"]
    lines = [json.dumps({"step": 0, "prompt": prompt, "answer": "x"}) for prompt in prompts]
    (directory / rundir.SAMPLES).write_text("\n".join([*lines, '{"step": 1, "pro']), encoding="utf-8")
    return directory
