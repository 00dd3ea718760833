"""The trainer's own steps, followed: two of them, since the first one makes the optimizer's state."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from accelerate import PartialState
from torch import distributed
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, TrainerCallback

from ftune.data.collate import Collator
from ftune.losses import IGNORED
from ftune.memory.skeleton import is_flash
from ftune.memory.tracked import EVALUATION, FORWARD, OPTIMIZER, Tracked
from ftune.models.quiet import quiet
from ftune.recipe.schema import Recipe
from ftune.resolve import RunSpec
from ftune.training.settings import settings_of
from ftune.training.trainer import FtuneTrainer, Parts


class Rows(IterableDataset[dict[str, Any]]):
    """Rows of given lengths, of which all tokens are learned or those in the last places; over and over, or once."""

    names: tuple[str, ...] = ()

    def __init__(
        self, lengths: Sequence[int], *, packed: bool, endless: bool = True, learned: int | None = None
    ) -> None:
        self._lengths, self._packed, self._endless = tuple(lengths), packed, endless
        self._masked = 0 if learned is None else max(self._lengths) - learned

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for length in itertools.chain.from_iterable(
            itertools.repeat(self._lengths) if self._endless else [self._lengths]
        ):
            ids = numpy.full(length, 5, dtype=numpy.int64)
            labels = ids.copy()
            labels[: self._masked] = IGNORED
            row: dict[str, Any] = {"input_ids": ids, "labels": labels, "source": 0}
            if self._packed:
                row["position_ids"] = numpy.arange(length) % ((length + 1) // 2)
            yield row


class Follow(TrainerCallback):  # type: ignore[misc]
    """Tells the tracker where in a step the trainer is, and which step counts."""

    def __init__(self, tracked: Tracked, counted: int = 2, *, evaluates: bool = False) -> None:
        self._tracked, self._counted, self._evaluates = tracked, counted, evaluates

    def on_step_begin(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self._counted - 1:
            self._tracked.restart(FORWARD)
        self._tracked.enter(FORWARD)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._tracked.enter(OPTIMIZER)

    def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        self._tracked.own_survivors()
        self._tracked.enter(FORWARD)
        if state.global_step == self._counted:
            self._tracked.enter(EVALUATION)
            if not self._evaluates:
                self._tracked.stop()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._tracked.stop()


def masks_documents(recipe: Recipe) -> bool:
    """Return whether rows of several documents need a mask that keeps them apart: the flash-attn package needs none."""
    return recipe.data.packing and not is_flash(recipe)


def worst_lengths(spec: RunSpec) -> tuple[int, ...]:
    """Return the lengths of the rows of the largest micro-batch that a recipe allows."""
    recipe = spec.recipe
    return (recipe.data.max_length,) * recipe.training.rows_at_once


def evaluated_rows(spec: RunSpec, lengths: Sequence[int] = ()) -> Rows | None:
    """Return the rows of the largest batch that is evaluated; None where a recipe evaluates nothing."""
    recipe = spec.recipe
    if recipe.training.eval_strategy == "no" and recipe.data.eval is None:
        return None
    largest = (recipe.data.max_length,) * recipe.training.per_device_eval_batch_size
    return Rows(lengths or largest, packed=masks_documents(recipe), endless=False)


def steps(
    spec: RunSpec,
    model: Any,
    rows: Any,
    callbacks: Sequence[Callable[[FtuneTrainer], Any]],
    *,
    count: int = 2,
    eval_rows: Any = None,
) -> tuple[int, int]:
    """Train for some steps, evaluate after the last one where there are rows for it, and write nothing.

    `callbacks` are made of the trainer. Returns the bytes that a checkpoint and the result would take on the disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        training = spec.recipe.training.model_copy(update={"output_dir": folder, "load_best_model_at_end": False})
        recipe = dataclasses.replace(spec.recipe, training=training)
        # A CPU has no float16 autocast for training; bfloat16 is as wide.
        narrow = training.bf16 or training.fp16
        settings = settings_of(
            dataclasses.replace(spec, recipe=recipe),
            max_steps=count,
            save_strategy="no",
            eval_strategy="no" if eval_rows is None else "steps",
            eval_steps=None if eval_rows is None else count,
            metric_for_best_model=None,
            report_to="none",
            logging_strategy="no",
            use_cpu=True,
            bf16=bool(narrow),
            fp16=False,
            tf32=None,
            torch_compile=False,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            dataloader_prefetch_factor=None,
            ddp_backend="gloo" if distributed.is_initialized() else None,
        )
        if settings.world_size > 1:
            # Several ranks number the processor, and tensors without numbers of cpu:0 are not those of cpu.
            PartialState().device = settings.__dict__["_setup_devices"] = torch.device("cpu")
        collator = Collator(0, flatten=is_flash(recipe))
        with quiet():
            trainer = FtuneTrainer(Parts(recipe, model, None, rows, eval_rows, collator, settings), [])
            trainer.args.fp16 = bool(training.fp16)  # what our own optimizers ask, once nobody else does
            trainer.remove_callback(PrinterCallback)
            for callback in callbacks:
                trainer.add_callback(callback(trainer))
            trainer.train()
            return trainer.saved_bytes()
