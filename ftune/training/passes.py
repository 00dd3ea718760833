"""In how many passes each batch is computed: in one, and in more from a step on that had no room for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ftune.resolve import Decision, RunSpec
from ftune.training import directory
from ftune.training.progress import Progress

KEY = "passes_per_batch"
"""Of the decision that says so in `run.json`: passes by the step from which on they are made."""

Batch = dict[str, Any]


class Passes:
    """How many passes a run makes of a batch, at each of its steps; what changes is written down at once."""

    def __init__(self, spec: RunSpec, shown: Progress) -> None:
        self._spec, self._shown = spec, shown
        self._from_step = passes_of(spec)

    def at(self, step: int) -> int:
        """Return the passes of a step; steps count from 1."""
        return max((passes for first, passes in self._from_step.items() if first <= step), default=1)

    def split(self, batch: Batch, passes: int) -> list[Batch]:
        """Return what is computed at once."""
        return split(batch, passes, self.rows_of(batch))

    def rows_of(self, batch: Batch) -> int:
        """Return the rows of a whole batch, of which this one may be the incomplete last."""
        training, rows = self._spec.recipe.training, len(batch["input_ids"])
        # Rows that were joined into one are told apart by their positions alone.
        joined = rows == 1 and "position_ids" in batch
        return rows if joined or training.max_tokens_per_batch else training.rows_at_once

    def more(self, step: int, passes: int, why: str) -> None:
        """Make so many passes from a step on."""
        self._from_step[step] = passes
        training = self._spec.recipe.training
        rows = math.ceil(training.rows_at_once / passes)
        times = training.gradient_accumulation_steps * passes
        said = f"batches in {passes} passes from step {step} on"
        if not training.max_tokens_per_batch:
            said += f", as per_device_train_batch_size: {rows} with gradient_accumulation_steps: {times} would"
        by_step = {str(first): count for first, count in sorted(self._from_step.items())}
        self._spec = directory.note(self._spec, Decision(KEY, by_step, f"{why}; {said}"))
        self._shown.say(f"warning: {why}; {said}")


def passes_of(spec: RunSpec) -> dict[int, int]:
    """Return in how many passes batches are computed, by the step from which on they are."""
    found = (decision.value for decision in spec.decisions if decision.key == KEY)
    return {int(step): passes for value in found for step, passes in value.items()}


def keep_passes(spec: RunSpec, before: RunSpec) -> RunSpec:
    """Return a spec with the passes that an earlier one of the same run had come to."""
    kept = tuple(decision for decision in before.decisions if decision.key == KEY)
    return replace(spec, decisions=(*spec.decisions, *kept))


def split(batch: Batch, passes: int, rows: int) -> list[Batch]:
    """Return a batch, of which a whole one has so many rows, in parts of its rows, in their order.

    A part is padded to its own longest row, as the collator would have. Where there are more passes than rows, a row
    of several packed documents is parted between documents: its first token is predicted by none before it.
    """
    size = math.ceil(rows / passes)
    parts = [_rows(batch, start, start + size) for start in range(0, len(batch["input_ids"]), size)]
    if passes <= rows or "position_ids" not in batch:
        return parts
    return [piece for part in parts for piece in _documents(part, math.ceil(passes / rows))]


def _rows(batch: Batch, start: int, end: int) -> Batch:
    part = {name: values[start:end] for name, values in batch.items()}
    if "attention_mask" not in part:
        return part
    longest = int(part["attention_mask"].sum(dim=1).max())
    return {name: values[:, :longest] for name, values in part.items()}


def _documents(row: Batch, count: int) -> list[Batch]:
    """Return a packed row in up to so many pieces of about as many tokens, parted where a document begins."""
    starts = (row["position_ids"][0] == 0).nonzero().flatten().tolist()
    tokens = row["input_ids"].shape[1]
    cuts = {min(starts, key=lambda start: abs(start - tokens * piece / count)) for piece in range(1, count)}
    borders = [0, *sorted(cuts - {0}), tokens]
    return [{name: values[:, start:end] for name, values in row.items()} for start, end in itertools.pairwise(borders)]


def lengths_of(batch: Mapping[str, Any]) -> list[int]:
    """Return the tokens of each row, without padding; of packed rows those of the sequence."""
    if "attention_mask" in batch:
        return [int(length) for length in batch["attention_mask"].sum(dim=1).tolist()]
    rows, length = batch["input_ids"].shape
    return [length] * rows


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device had no memory for a tensor, or for a library's scratch."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # A processor's allocator, and cuBLAS, raise a plain RuntimeError with these words.
    words = ("can't allocate memory", "not enough memory: you tried to allocate", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
