"""What a run is going to need, asked before its weights are loaded: the batch that needs most, and the answer."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy

from ftune.data.batches import batches_of
from ftune.data.prepare import Prepared
from ftune.data.sequences import Sequences
from ftune.errors import FtuneError, MachineError, Problem, RunError
from ftune.resolve import Decision, RunSpec, check_later
from ftune.training import directory
from ftune.training.passes import passes_of
from ftune.training.progress import Progress
from ftune.units import format_bytes


@dataclass(frozen=True)
class LargestBatches:
    """The batches of a run that take most memory."""

    train: tuple[int, ...]
    """Tokens of each row that is computed at once."""
    evaluated: tuple[int, ...]
    """Of the largest batch that is evaluated; empty where none is."""
    learned: int | None = None
    """At no more places than this a token is learned; None where nobody knows."""


@dataclass(frozen=True)
class Forecast:
    """A plan, as far as a run has to know it."""

    allocated_bytes: int
    """What compares with the run's own peak memory: allocated on a GPU, tensors on a processor."""
    parts: Mapping[str, int]
    """Bytes at the peak by what they are for."""
    lines: tuple[str, ...]
    """What is said of it."""
    refusal: Problem | None
    """Where it cannot fit."""


def spoken(parts: Mapping[str, int]) -> str:
    """Return the parts of a peak in words, the largest first."""
    by_size = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{part} {format_bytes(size)}" for part, size in by_size if size)


BatchesOf = Callable[[RunSpec], LargestBatches]
"""Tells the largest batches of a run on the rows that are there."""
Foresee = Callable[[RunSpec, BatchesOf], Forecast]
"""Returns the plan of a run; raises where there can be none."""
ChooseRows = Callable[[RunSpec, BatchesOf], tuple[Decision, ...]]
"""Decides how many rows of a step are computed at once; raises where no plan says it."""


def largest_batches(spec: RunSpec, data: Prepared) -> LargestBatches:
    """Return the largest batches of the rows there are; of a stream, which nobody has seen, what may come."""
    training, most = spec.recipe.training, spec.recipe.data.max_length
    passes = max(passes_of(spec).values(), default=1)
    evaluated = _longest(data.eval.lengths, training.per_device_eval_batch_size) if data.eval is not None else ()
    if not isinstance(data.train, Sequences):
        whole: tuple[int, ...] = (most,) * training.rows_at_once
    elif training.group_by_length or training.max_tokens_per_batch is not None:
        whole = _largest_planned(spec, data.train.lengths)
    else:
        whole = _longest(data.train.lengths, training.rows_at_once)
    whole = whole[: math.ceil(len(whole) / passes)]
    return LargestBatches(whole, evaluated, _most_learned(data.train, whole))


def _most_learned(rows: object, lengths: tuple[int, ...]) -> int | None:
    """Return at how many places of a batch a token is learned at the most: were no two of its rows' at the same."""
    if not isinstance(rows, Sequences) or rows.groups is not None:
        return None
    most = numpy.sort(rows.learned())[::-1][: len(lengths)]
    return min(max(lengths), int(most.sum(dtype=numpy.int64)))


def _longest(lengths: numpy.ndarray, count: int) -> tuple[int, ...]:
    """Return the lengths of the longest row beside others of which one is padded, where rows differ at all."""
    order = numpy.sort(lengths)[::-1]
    chosen = [int(length) for length in order[:count]]
    if len(chosen) > 1:
        chosen[-1] = int(order[-1])  # the shape is that of the longest; a mask of padding takes room beside it
    return tuple(chosen)


def _largest_planned(spec: RunSpec, lengths: numpy.ndarray) -> tuple[int, ...]:
    """Return the lengths of the batch with most places, where batches are known before the run."""
    training = spec.recipe.training
    planned = batches_of(
        lengths,
        rows=training.rows_at_once,
        most_tokens=training.max_tokens_per_batch,
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
        seed=training.seed,
    )
    largest = max(planned, key=lambda batch: (len(batch) * lengths[batch].max(), lengths[batch].max()))
    return tuple(int(length) for length in lengths[largest])


def check_alone(spec: RunSpec, *, plans: bool) -> None:
    """Raise RunError where rows are left to a plan and there is none: of several processes, or of a launch."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if spec.recipe.training.per_device_train_batch_size == "auto" and (several or not plans):
        what = "per_device_train_batch_size: auto is decided by the plan of one process"
        fix = "ask `ftune plan RECIPE`, and set the numbers that it decides"
        why = "this run has several" if several else "a launch makes no plan"
        raise RunError(Problem("rows-auto", what, why=why, fix=fix))


def settle_rows(choose: ChooseRows, spec: RunSpec, data: Prepared, shown: Progress) -> RunSpec:
    """Return the spec with as many rows at once as fit, written down; raises RunError where no plan says how many."""
    shown.say("planning: how many rows fit at once is traced without weights")
    try:
        decisions = choose(spec, functools.partial(largest_batches, data=data))
    except Exception as error:  # whatever a plan stumbles over, a number can be set
        why = str(error) if isinstance(error, FtuneError) else _in_a_line(error)
        what, fix = "no plan says how many rows fit at once", "set training.per_device_train_batch_size to a number"
        raise RunError(Problem("rows-auto", what, why=why, fix=fix)) from None
    for decision in decisions:
        check_later(spec, decision.key, decision.value, shown.say)
        shown.say(f"{decision.key} = {decision.value}: {decision.why}")
    return directory.settle(spec, *decisions)


def foretold(foresee: Foresee, spec: RunSpec, data: Prepared, shown: Progress, *, force: bool) -> Forecast | None:
    """Ask for the plan of a run and say it; None where there is none, which stops no run.

    Raises MachineError where it cannot fit, unless that is to be tried.
    """
    shown.say("planning: a step is traced without weights (--no-plan leaves it out)")
    try:
        found = foresee(spec, functools.partial(largest_batches, data=data))
    except FtuneError as error:
        shown.say(f"no plan: {error}")
        return None
    except Exception as error:  # whatever a plan stumbles over, the run may work
        shown.say(f"no plan: {_in_a_line(error)}")
        return None
    for line in found.lines:
        shown.say(line)
    if found.refusal is not None:
        if not force:
            raise MachineError(found.refusal)
        shown.say(f"warning: {found.refusal.what}; training all the same (--force)")
    return found


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
