"""A recipe's training step, traced without weights, without a GPU and without a network.

    trace(spec, config) -> Trace

The trace runs in a process of its own, `python -m ftune.memory.traced`: it changes what PyTorch and transformers do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ftune.errors import Problem, RunError
from ftune.memory.events import Trace
from ftune.memory.written import read, write
from ftune.resolve import RunSpec

Device = Literal["cpu", "cuda"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be traced."""

    spec: RunSpec
    config: Mapping[str, Any]
    """The model's config.json."""
    device: Device = "cpu"
    """`cpu` is this machine's; `cuda` chooses operators as PyTorch does on a GPU."""
    lengths: tuple[int, ...] = ()
    """Tokens of each row of a micro-batch; empty for the largest one that the recipe allows."""


def trace(
    spec: RunSpec, config: Mapping[str, Any], *, device: Device = "cpu", lengths: Sequence[int] = ()
) -> Trace:
    """Return the record of the second training step; raises RunError where this model cannot be traced."""
    import json

    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "trace"
        asked = {"spec": spec.to_json(), "config": dict(config), "device": device, "lengths": list(lengths)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __name__, str(answer)],
            input=json.dumps(asked),
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not answer.exists():
            lines = done.stderr.strip().splitlines()
            what = f"the training step of a {config.get('model_type', 'model')} cannot be traced"
            why = lines[-1][:300] if lines else f"the process ended with {done.returncode}"
            raise RunError(Problem("trace-failed", what, why=why, fix="train a few steps, and read peak_memory_bytes"))
        return read(answer)


def traced_here(asked: Asked) -> Trace:
    """Trace in this process, which is then fit for nothing else."""
    from ftune.memory.cuda import as_on_cuda
    from ftune.memory.numberless import fake_mode, numberless
    from ftune.memory.skeleton import config_from, skeleton
    from ftune.memory.step import Follow, Rows, two_steps, worst_lengths
    from ftune.memory.tracked import IN_PYTHON, IN_PYTHON_ON_CUDA, Tracked

    recipe = asked.spec.recipe
    lengths = asked.lengths or worst_lengths(asked.spec)
    packed = recipe.data.packing
    fake = fake_mode()
    model = skeleton(recipe, config_from(asked.config), fake)
    emulated = as_on_cuda() if asked.device == "cuda" else contextlib.nullcontext()
    tracked = Tracked(kernels=IN_PYTHON if asked.device == "cpu" else IN_PYTHON_ON_CUDA)
    tracked.follow(model)
    try:
        with numberless(fake, padded=len(set(lengths)) > 1), emulated, tracked:
            rows = Rows(lengths, packed=packed)
            two_steps(asked.spec, model, rows, [lambda trainer: Follow(tracked)])
    finally:
        tracked.unfollow()
    return tracked.trace()


def main() -> None:
    import json

    values = json.load(sys.stdin)
    asked = Asked(
        RunSpec.from_json(values["spec"]), values["config"], values["device"], tuple(values["lengths"])
    )
    write(traced_here(asked), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
