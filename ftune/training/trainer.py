"""Hugging Face's Trainer with ftune's loss, optimizer, evaluation, metrics and checkpoints in it."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ftune import plugin, rundir
from ftune.errors import Problem, RunError
from ftune.losses import IGNORED
from ftune.recipe.schema import Recipe
from ftune.sharding.model import engine_in_use, let_go
from ftune.training.callbacks import StopOnRequest
from ftune.training.meter import Meter, losses_by_source, peak_memory_bytes
from ftune.training.saving import SavingTrainer
from ftune.training.shrinking import EVALUATING, Doing


@dataclass(frozen=True)
class Parts:
    """What a run is made of, loaded."""

    recipe: Recipe
    model: Any
    tokenizer: Any
    train_rows: Any
    eval_rows: Any
    collator: Any
    arguments: Any
    sources: tuple[str, ...] = ()
    """What the sources of training rows are called."""


class FtuneTrainer(SavingTrainer):
    """Token-weighted losses, checkpoints that are whole or absent, and metrics that survive a resume."""

    def __init__(self, parts: Parts, callbacks: list[TrainerCallback]) -> None:
        self.recipe = parts.recipe
        self.directory = Path(parts.recipe.training.output_dir)
        self.objective = plugin.objective(parts.recipe.objective.method)
        self.last_evaluation: tuple[int, float] | None = None
        self.stop: StopOnRequest | None = None
        super().__init__(
            model=parts.model,
            args=parts.arguments,
            data_collator=parts.collator,
            train_dataset=parts.train_rows,
            eval_dataset=parts.eval_rows,
            processing_class=parts.tokenizer,
            callbacks=callbacks,
        )
        # Our loss divides by the trained tokens of the whole accumulated batch on all ranks, so the Trainer has to
        # count them (from the second position on, like the loss), and must not divide again.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.loss_is_scaled_for_ga = True
        self.meter = Meter(self.args.device, _told_apart(parts.sources))
        self.prepare_to_move()
        self._finite = torch.ones((), dtype=torch.bool, device=self.args.device)

    def get_train_dataloader(self) -> Any:
        """Return batches of like or bounded length where the recipe asks for them, else the Trainer's random ones."""
        if (planned := self.planned_batches) is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=planned,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # As for one process: these batches are this rank's already.
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def _prepare_for_training(self, *arguments: Any, **named: Any) -> Any:
        """Prepare as Hugging Face does; raise RunError where something else carries the run than what was asked for."""
        prepared = super()._prepare_for_training(*arguments, **named)
        carried = engine_in_use(prepared[0], reduces_itself=self._reduces_itself)
        asked = self.recipe.distributed.engine
        if self.accelerator.num_processes > 1 and carried != asked:
            what = f"distributed.engine is {asked}, and what carries this run is {carried}"
            raise RunError(Problem("engine-in-use", what, fix="this is a bug in ftune: report it with run.json"))
        return prepared

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's loss, as its share of the accumulated batch's mean over trained tokens."""
        loss = self.objective.loss(
            model,
            inputs,
            num_items=num_items_in_batch,
            label_smoothing=self.recipe.training.label_smoothing_factor,
            options=self.recipe.objective.options,
            by_source=self.meter.by_source,
        )
        # DDP averages gradients over ranks, and each rank has already divided by the tokens of all.
        return loss * self.accelerator.num_processes

    def count(self, loss: torch.Tensor, batch: dict[str, Any]) -> None:
        self.meter.add(loss, batch)
        self._finite &= torch.isfinite(loss)

    def stop_if_not_finite(self) -> None:
        """Raise RunError once a loss was NaN or infinite: nothing learned after it is worth keeping."""
        if not bool(self._finite):
            self._refuse("the loss is not a number")

    def stop_if_weights_not_finite(self) -> None:
        """Raise RunError where weights about to be saved are not numbers; the last update is in no loss yet."""
        self.stop_if_not_finite()
        if not self.weights_are_finite():
            self._refuse("weights are not numbers")

    def _refuse(self, what: str) -> None:
        kept = rundir.checkpoints(self.directory)
        raise RunError(
            Problem(
                "loss-not-finite",
                f"{what}, at step {self.state.global_step} or shortly before",
                why="weights or activations overflowed; training on would only write NaN over them",
                fix="lower the learning rate, set max_grad_norm: 1.0, or compute in bf16 or float32; "
                + (f"{kept[-1].name} is from before" if kept else "no checkpoint was written yet"),
            )
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the Trainer's window averages, which restart at a resume, by the meter's."""
        if "loss" in logs:
            self.stop_if_not_finite()
            logs = {**logs, **self._read_meter()}
            logs["seconds_per_step"] = self.meter.seconds / self.meter.total_steps
            if self.passes is not None and (passes := self.passes.at(self.state.global_step)) > 1:
                logs["passes_per_batch"] = passes
        elif "train_loss" in logs:
            return
        logs["peak_memory_bytes"] = peak_memory_bytes(self.args.device)
        super().log(logs)

    def show_average(self) -> None:
        """Put the average into the weights, where the optimizer keeps one; training goes on from where it was."""
        if hasattr(self.own_optimizer, "eval"):
            self.own_optimizer.eval()  # the Trainer calls `train` before each batch

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Do something beside training: off the clock, and without drawing from training's random numbers."""
        self.meter.stop_clock()
        self.show_average()
        states = random.getstate(), numpy.random.get_state()
        devices = [self.args.device.index or 0] if self.args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            if self.is_split:
                let_go(self.model)
            self.meter.start_clock()

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        self.doing = Doing(EVALUATING, self.state.global_step)
        with self.aside():
            metrics: dict[str, float] = super().evaluate(*arguments, **named)
        self.doing = Doing()
        self.last_evaluation = (self.state.global_step, metrics["eval_loss"])
        return metrics

    def evaluated_at(self, step: int) -> bool:
        """Return whether the last evaluation was that of a step."""
        return self.last_evaluation is not None and self.last_evaluation[0] == step

    def evaluation_loop(self, dataloader: Any, description: str, *_: Any, **named: Any) -> EvalLoopOutput:
        """Return the mean loss over all trained tokens of all rows; the Trainer's would be a mean of batch means."""
        # Autocast is our own: the model has it only once `train` has prepared it, which a run at its end does not.
        model = self._wrap_model(self.model, training=False)
        model.eval()
        names = _told_apart(self.eval_dataset.names)
        sums = torch.zeros(3 + 2 * len(names), dtype=torch.float64, device=self.args.device)
        by_source = sums[3:].view(-1, 2) if names else None
        with torch.no_grad():
            for number, batch in enumerate(dataloader):
                batch = self._prepare_inputs(batch)
                self._leave_out_repeated(batch, number)
                count = (batch["labels"][:, 1:] != IGNORED).sum()
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    loss = self.objective.loss(
                        model,
                        batch,
                        num_items=1,
                        label_smoothing=0.0,
                        options=self.recipe.objective.options,
                        by_source=by_source,
                    )
                sums[:3] += torch.stack([loss.double(), count.double(), torch.ones_like(sums[2])])
        total, tokens, batches, *rest = self.accelerator.reduce(sums, "sum").tolist()
        what = f"{named.get('metric_key_prefix', 'eval')}_loss"
        metrics = {what: total / tokens if tokens else math.nan, **losses_by_source(names, rest, what)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(batches))

    def _leave_out_repeated(self, batch: dict[str, Any], number: int) -> None:
        """Learn nothing of rows of an evaluation that are repeated, so that ranks have equally many batches.

        Rows that flash attention sees as one are left as they are: a few of them count twice.
        """
        size, ranks = self.args.eval_batch_size, self.accelerator.num_processes
        if ranks > 1 and len(batch["labels"]) == size:
            first = (number * ranks + self.args.process_index) * size
            batch["labels"][max(0, len(self.eval_dataset) - first) :] = IGNORED

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save the best weights when they are found, whatever the save interval, if the run is to end with them."""
        best: bool = super()._determine_best_metric(metrics, trial)
        if best and self.recipe.training.load_best_model_at_end:
            self.control.should_save = True
        return best

    def _init_training_state(self, max_steps: int, *more: Any) -> Any:
        """Take the intervals of logging, evaluating and saving from the settings: a checkpoint holds the old ones."""
        found = super()._init_training_state(max_steps, *more)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _read_meter(self) -> dict[str, float]:
        ranks = self.accelerator.num_processes
        return self.meter.read((lambda sums: self.accelerator.reduce(sums, "sum")) if ranks > 1 else _itself, ranks)

    def close_meter(self) -> None:
        """Count the steps after the last logged line, and stop the clock."""
        self._read_meter()


def _told_apart(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the sources, where there are several."""
    return names if len(names) > 1 else ()


def _itself(sums: torch.Tensor) -> torch.Tensor:
    return sums
