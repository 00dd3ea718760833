"""The trainer's own steps, followed: two of them, since the first one makes the optimizer's state."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, TrainerCallback

from ftune.data.collate import Collator
from ftune.memory.tracked import FORWARD, OPTIMIZER, Tracked
from ftune.models.quiet import quiet
from ftune.resolve import RunSpec
from ftune.training.settings import settings_of
from ftune.training.trainer import FtuneTrainer, Parts


class Rows(IterableDataset[dict[str, Any]]):
    """Rows of given lengths, over and over, of which every token is learned."""

    names: tuple[str, ...] = ()

    def __init__(self, lengths: Sequence[int], *, packed: bool) -> None:
        self._lengths, self._packed = tuple(lengths), packed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            for length in self._lengths:
                ids = numpy.full(length, 5, dtype=numpy.int64)
                row: dict[str, Any] = {"input_ids": ids, "labels": ids, "source": 0}
                if self._packed:
                    row["position_ids"] = numpy.arange(length) % ((length + 1) // 2)
                yield row


class Follow(TrainerCallback):  # type: ignore[misc]
    """Tells the tracker where in a step the trainer is."""

    def __init__(self, tracked: Tracked) -> None:
        self._tracked = tracked

    def on_step_begin(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 1:
            self._tracked.restart(FORWARD)
        self._tracked.enter(FORWARD)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._tracked.enter(OPTIMIZER)

    def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        self._tracked.own_survivors()
        self._tracked.enter(FORWARD)
        if state.global_step == 2:
            self._tracked.stop()


def worst_lengths(spec: RunSpec) -> tuple[int, ...]:
    """Return the lengths of the rows of the largest micro-batch that a recipe allows."""
    recipe = spec.recipe
    return (recipe.data.max_length,) * recipe.training.per_device_train_batch_size


def two_steps(spec: RunSpec, model: Any, rows: Any, callbacks: Sequence[Any], *, steps: int = 2) -> None:
    """Train for two steps and write nothing; `callbacks` are functions of the trainer that return a callback."""
    with tempfile.TemporaryDirectory() as folder:
        training = spec.recipe.training.model_copy(update={"output_dir": folder})
        recipe = dataclasses.replace(spec.recipe, training=training)
        settings = settings_of(
            dataclasses.replace(spec, recipe=recipe),
            max_steps=steps,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            logging_strategy="no",
            use_cpu=True,
            tf32=None,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            dataloader_prefetch_factor=None,
        )
        collator = Collator(0, flatten=recipe.model.attn_implementation.startswith("flash"))
        with quiet():
            trainer = FtuneTrainer(Parts(recipe, model, None, rows, None, collator, settings), [])
            trainer.remove_callback(PrinterCallback)
            for callback in callbacks:
                trainer.add_callback(callback(trainer))
            trainer.train()
