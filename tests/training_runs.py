"""Small runs for tests: real rows, a real model of two layers, recipes as mappings."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEFINITIONS = ROOT / "recipes" / "data" / "definitions.train.jsonl"
EVALUATION = ROOT / "recipes" / "data" / "definitions.eval.jsonl"


def on_ranks(ranks: int, *words: str, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a script, or what torchrun takes in its place, on so many ranks; `paths` are searched for modules, too."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"] if ranks > 1 else []
    found = os.pathsep.join(map(str, (ROOT, *paths)))
    done = subprocess.run(
        [sys.executable, *launcher, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": found},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def rows_file(path: Path, count: int, *, longest: int = 180, source: Path = DEFINITIONS) -> Path:
    """Write real rows of unequal length, the first that fit the tiny model's context byte by byte."""
    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        turns = json.loads(line)["messages"]
        turns[0]["content"] = turns[0]["content"].split(",")[0]
        turns[1]["content"] = turns[1]["content"][: 10 + 13 * len(rows) % 90]
        if sum(len(turn["content"]) + 20 for turn in turns) <= longest:
            rows.append({"messages": turns})
        if len(rows) == count:
            break
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(model: Path, rows: Path, output: Path, /, **changes: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that trains in float32 with everything that costs time turned off, changed as asked."""
    base: dict[str, dict[str, Any]] = {
        "model": {"model_name_or_path": str(model)},
        "data": {"train": str(rows), "max_length": 250},
        "objective": {},
        "tuning": {},
        "training": {
            "output_dir": str(output),
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "sample_prompts": [],
        },
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return base


def metrics(directory: Path | str) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics."""
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path | str) -> list[float]:
    """Return the training losses of a run in order."""
    return [line["loss"] for line in metrics(directory) if "loss" in line]


def weights(directory: Path | str) -> dict[str, Any]:
    """Return the final weights (or adapter) of a run."""
    from safetensors.torch import load_file

    found = sorted((Path(directory) / "model").glob("*.safetensors"))
    return {name: tensor for path in found for name, tensor in load_file(path).items()}


def same_bits(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two sets of weights are equal bit for bit."""
    return first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)


def shuffled(values: list[Any], seed: int) -> list[Any]:
    """Return the values in another order."""
    return random.Random(seed).sample(values, len(values))


def no_rows(count: int, *, rows: int | None = None) -> Any:
    """Stand for the batches of a run where nothing may look at any."""
    raise AssertionError("rows were looked at")
