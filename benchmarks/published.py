"""What papers print of LLaMA-7B's memory, beside what a plan says of the nearest recipe.

    python benchmarks/published.py [--only lomo|hift]

Each column is the most that an owner ever holds in the step, as the papers count, and not what it holds at the peak.
Nothing is measured: both sides are bytes of 6,738,415,616 parameters. Two shallow models stand for the deep one, since
every column grows layer by layer.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ftune.memory.ask import config_of_model, machine_with, plannable
from ftune.memory.events import Owner, Trace
from ftune.memory.peak import peak
from ftune.memory.traced import trace
from ftune.memory.tracer import kept_tracer
from ftune.resolve import resolve

_GIB, _MIB = 1024**3, 1024**2
_HALF = {"dtype": "bfloat16"}
_MIXED: dict[str, Any] = {"bf16": True}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a paper's table, and the recipe that comes nearest."""

    table: str
    name: str
    printed: tuple[float, float, float, float]
    """Parameters, gradients, optimizer state, total: in GiB for LOMO; for HiFT in MiB, the total in GiB."""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    tuning: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


def _lomo(name: str, printed: tuple[float, float, float, float], optim: str, checkpointing: bool) -> Row:
    precision = {} if optim == "lomo" else _MIXED
    training = {"optim": optim, "gradient_checkpointing": checkpointing, **precision}
    return Row("lomo", name, printed, _HALF if optim == "lomo" else {}, {}, training)


def _hift(optim: str, precision: str, group: bool, para: float, gradient: float, state: float, total: float) -> Row:
    name = f"{optim}, {precision}, {'HiFT' if group else 'all'}"
    named = {"AdamW": "adamw_torch", "SGD": "sgd", "Adafactor": "adafactor"}[optim]
    hi = precision == "mixed Hi"
    return Row(
        "hift",
        name,
        (para, gradient, state, total),
        _HALF if hi else {},
        {"method": "hift", **({"mixed": True} if hi else {})} if group else {},
        {"optim": named, **(_MIXED if precision == "mixed" else {})},
    )


ROWS = (
    _lomo("AdamW", (12.55, 12.55, 75.31, 147.02), "adamw_torch", False),
    _lomo("AdamW, checkpointing", (12.55, 12.55, 75.31, 102.20), "adamw_torch", True),
    _lomo("SGD", (12.55, 12.55, 25.10, 96.81), "sgd", False),
    _lomo("SGD, checkpointing", (12.55, 12.55, 25.10, 51.99), "sgd", True),
    _lomo("LOMO", (12.55, 0.24, 0, 59.40), "lomo", False),
    _lomo("LOMO, checkpointing", (12.55, 0.24, 0, 14.58), "lomo", True),
    _hift("AdamW", "float32", False, 25705.04, 25705.04, 51410.08, 142.11),
    _hift("AdamW", "float32", True, 25705.04, 772.03, 1544.06, 55.41),
    _hift("AdamW", "mixed", False, 38557.56, 25705.04, 51410.08, 145.50),
    _hift("AdamW", "mixed", True, 38557.56, 772.03, 1544.06, 61.54),
    _hift("AdamW", "mixed Hi", True, 13624.53, 772.03, 1544.06, 36.57),
    _hift("SGD", "float32", False, 25705.04, 25705.04, 0, 91.93),
    _hift("SGD", "float32", True, 25705.04, 772.03, 0, 55.41),
    _hift("Adafactor", "float32", False, 25705.04, 25705.04, 10.82, 91.94),
    _hift("Adafactor", "float32", True, 25705.04, 772.03, 0.33, 55.41),
)


def columns(traced: Trace) -> Counter[str]:
    """Return the most bytes of each column, and of all together."""
    held: Counter[Owner] = Counter()
    found: Counter[str] = Counter(total=peak(traced).size_bytes)
    for event in traced.events:
        held[event.owner] += event.size_bytes
        found[event.owner.value] = max(found[event.owner.value], held[event.owner])
    return found


def planned(row: Row) -> dict[str, float]:
    """Return the columns of a row's recipe, at all 32 layers."""
    machine, _ = machine_with("a100-80gb")
    values = {
        "model": {"model_name_or_path": "huggyllama/llama-7b", "dtype": "float32", **row.model},
        "data": {"train": "rows.jsonl", "max_length": 512},
        "tuning": row.tuning,
        "training": {
            "output_dir": "run",
            "per_device_train_batch_size": 8,
            "bf16": False,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "max_grad_norm": 0,
            **row.training,
        },
    }
    loaded, _ = plannable(values, (), machine)
    spec = resolve(loaded, machine, fingerprints=False)
    config = config_of_model(spec.recipe.model)
    few, more = (columns(trace(spec, config, device="cuda", layers=layers)) for layers in (3, 5))
    return {name: few[name] + (more[name] - few[name]) * (32 - 3) / 2 for name in more}


def lines(rows: Iterable[Row]) -> Iterable[str]:
    yield "| table | row | | parameters | gradients | state | total, GiB |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        found = planned(row)
        unit = _GIB if row.table == "lomo" else _MIB
        ours = [found.get(name, 0) / unit for name in ("weight", "gradient", "optimizer")]
        *theirs, total = row.printed
        cells = " | ".join(f"{value:.2f}" for value in theirs)
        yield f"| {row.table} | {row.name} | printed | {cells} | {total:.2f} |"
        cells = " | ".join(f"{value:.2f}" for value in ours)
        yield f"| | | planned | {cells} | {found['total'] / _GIB:.2f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    with kept_tracer():
        for line in lines(row for row in ROWS if options.only in ("", row.table)):
            print(line, flush=True)
