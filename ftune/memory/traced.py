"""A recipe's training step, traced without weights, without a GPU and without a network.

    trace(spec, config) -> Trace

The trace runs in a process of its own, `python -m ftune.memory.traced`: it changes what PyTorch and transformers do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ftune.errors import Problem, RunError
from ftune.memory.events import Trace
from ftune.memory.tracer import TookTooLong, limit_seconds, run_traced
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
    evaluated: tuple[int, ...] = ()
    """Likewise of a batch that is evaluated, where the recipe evaluates."""
    learned: int | None = None
    """At how many places of a micro-batch a token is learned; None for all."""
    layers: int | None = None
    """How many layers to trace; None for all that the model has."""
    ranks: int = 1
    """How many processes share the run; the first one's step is traced."""


def trace(
    spec: RunSpec,
    config: Mapping[str, Any],
    *,
    device: Device = "cpu",
    lengths: Sequence[int] = (),
    evaluated: Sequence[int] = (),
    learned: int | None = None,
    layers: int | None = None,
    ranks: int = 1,
) -> Trace:
    """Return the record of a training step after the first, and of an evaluation where the recipe has one.

    Raises RunError where this model cannot be traced, or not in the time that `kept_tracer` gives.
    """
    import json

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        asked = {"spec": spec.to_json(), "config": dict(config), "device": device}
        asked |= {"lengths": list(lengths), "evaluated": list(evaluated), "learned": learned, "layers": layers}
        asked |= {"ranks": ranks}
        try:
            code, said = run_traced(json.dumps(asked), path)
        except TookTooLong:
            raise RunError(_too_long(config)) from None
        if code != 0 or not path.exists():
            lines = said.strip().splitlines()
            what = f"the training step of a {config.get('model_type', 'model')} cannot be traced"
            why = lines[-1][:300] if lines else f"the process ended with {code}"
            raise RunError(Problem("trace-failed", what, why=why, fix="train a few steps, and read peak_memory_bytes"))
        return read(path)


def _too_long(config: Mapping[str, Any]) -> Problem:
    what = f"following a step of a {config.get('model_type', 'model')} took longer than {limit_seconds():g} s"
    why = "each of its operators is followed by itself: many layers of different kinds, or loops over tokens, take long"
    fix = "allow more with --timeout SECONDS, or train a few steps (training.max_steps: 2) and read peak_memory_bytes"
    return Problem("trace-timeout", what, why=why, fix=fix)


def traced_here(asked: Asked) -> Trace:
    """Trace in this process, which is then fit for nothing else.

    Where weights move in turn, the turn that holds most is returned.
    """
    from ftune import plugin
    from ftune.memory.peak import peak

    if asked.ranks > 1:
        from ftune.memory.ranks import become_one_of

        become_one_of(asked.ranks)
    if not plugin.tuning(asked.spec.recipe.tuning.method).rotates:
        return _traced(asked, None)[0]
    found, number, count = [], 0, 1
    while number < count:
        trace, count = _traced(asked, number)
        found.append(trace)
        number += 1
    return max(found, key=lambda trace: peak(trace).size_bytes)


def _traced(asked: Asked, turn: int | None) -> tuple[Trace, int]:
    """Return one trace, and how many different turns there are."""
    from ftune import plugin
    from ftune.memory.bits import paged_on_host
    from ftune.memory.cuda import as_on_cuda
    from ftune.memory.numberless import fake_mode, numberless
    from ftune.memory.ranks import replicated
    from ftune.memory.skeleton import config_from, skeleton
    from ftune.memory.step import Follow, Rows, evaluated_rows, masks_documents, steps, worst_lengths
    from ftune.memory.tracked import IN_PYTHON, IN_PYTHON_ON_CUDA, Tracked
    from ftune.memory.turns import COUNTED, Turn
    from ftune.sharding.model import split

    spec, on_cuda = asked.spec, asked.device == "cuda"
    lengths, fake = asked.lengths or worst_lengths(spec), fake_mode()
    model = skeleton(spec.recipe, config_from(asked.config, layers=asked.layers), fake)
    tracked = Tracked(kernels=IN_PYTHON_ON_CUDA if on_cuda else IN_PYTHON, on_processor=not on_cuda)
    stage = spec.recipe.distributed.zero_stage
    if asked.ranks > 1 and stage >= 2:
        with numberless(fake):
            split(model, "cpu", stage=stage)
    tracked.follow(model)
    evaluated = evaluated_rows(spec, asked.evaluated)
    counted = 2 if turn is None else COUNTED
    turns: list[Turn] = []

    def takes_turns(trainer: Any) -> Turn:
        turns.append(Turn(trainer, tracked, turn or 0, moves=on_cuda))
        return turns[0]

    callbacks = [lambda trainer: Follow(tracked, counted, evaluates=evaluated is not None)]
    with contextlib.ExitStack() as stack:
        stack.callback(tracked.unfollow)
        stack.enter_context(numberless(fake))
        if on_cuda:
            stack.enter_context(as_on_cuda())
            if plugin.optimizer(spec.recipe.optimizer.method).pages_state:
                stack.enter_context(paged_on_host(tracked))
        stack.enter_context(tracked)
        stack.enter_context(replicated(tracked))
        rows = Rows(lengths, packed=masks_documents(spec.recipe), learned=asked.learned)
        if turn is not None:
            callbacks.append(takes_turns)
        checkpoint, result = steps(spec, model, rows, callbacks, count=counted, eval_rows=evaluated)
    trace = dataclasses.replace(tracked.trace(), checkpoint_bytes=checkpoint, model_bytes=result)
    return trace, turns[0].count if turns else 1


def answer(values: dict[str, Any], path: Path) -> None:
    """Trace what is asked, as JSON, into a file."""
    rows = {name: tuple(values.pop(name)) for name in ("lengths", "evaluated")}
    write(traced_here(Asked(RunSpec.from_json(values.pop("spec")), **rows, **values)), path)


def main() -> None:
    import json

    answer(json.load(sys.stdin), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
