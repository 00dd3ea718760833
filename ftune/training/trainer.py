"""Hugging Face's Trainer with ftune's loss, optimizer, evaluation, metrics and checkpoints in it."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from ftune import plugin, rundir
from ftune.errors import Problem, RunError
from ftune.losses import IGNORED
from ftune.models.finished import write_base
from ftune.recipe.schema import Recipe
from ftune.training import checkpoint
from ftune.training.callbacks import StopOnRequest
from ftune.training.meter import Meter, losses_by_source, peak_memory_bytes
from ftune.training.shrinking import EVALUATING, Doing, ShrinkingTrainer
from ftune.training.state_size import state_bytes_of


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


class FtuneTrainer(ShrinkingTrainer):
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

    @cached_property
    def _base(self) -> str | None:
        """What identifies the weights that are trained upon."""
        return plugin.tuning(self.recipe.tuning.method).fingerprint(self.model)

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
        if not all(bool(torch.isfinite(weight).all()) for weight in self.trained):
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
            for batch in dataloader:
                batch = self._prepare_inputs(batch)
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
        # `even_batches` repeats rows so that ranks have equal counts: with several ranks a few rows count twice.
        total, tokens, batches, *rest = self.accelerator.reduce(sums, "sum").tolist()
        what = f"{named.get('metric_key_prefix', 'eval')}_loss"
        metrics = {what: total / tokens if tokens else math.nan, **losses_by_source(names, rest, what)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(batches))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save the best weights when they are found, whatever the save interval, if the run is to end with them."""
        best: bool = super()._determine_best_metric(metrics, trial)
        if best and self.recipe.training.load_best_model_at_end:
            self.control.should_save = True
        return best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write everything a resume needs; the folder takes its name only when it is whole and read back."""
        self.stop_if_weights_not_finite()
        final = self.directory / rundir.CHECKPOINTS / rundir.checkpoint_name(self.state.global_step)
        with self.aside():
            if self.accelerator.num_processes > 1:
                self._save_together(final)
            else:
                self._save_alone(final)
        if self.args.should_save:
            checkpoint.prune(self.directory, keep=self.recipe.training.save_total_limit, best=self.best_checkpoint())
        self.accelerator.wait_for_everyone()

    def _stops_early(self) -> bool:
        """Return whether the run ends here by its own rules, before its last step and not on request."""
        requested = self.stop is not None and self.stop.stopped
        return self.control.should_training_stop and not requested and self.state.global_step < self.state.max_steps

    def best_checkpoint(self) -> Path | None:
        """Return the checkpoint of the lowest evaluation loss, where there is one; a moved run finds it again."""
        if not self.state.best_global_step:
            return None
        path = self.directory / rundir.CHECKPOINTS / rundir.checkpoint_name(self.state.best_global_step)
        return path if path.is_dir() else None

    def _save_alone(self, final: Path) -> None:
        try:
            with rundir.whole_directory(final) as folder:
                self._write_state(folder)
                checkpoint.seal(folder)
        except Exception as error:
            if checkpoint.out_of_room(error):
                raise checkpoint.saving_failed(final, error) from None
            raise

    def _save_together(self, final: Path) -> None:
        """Each rank writes its own random state into one partial folder, which the first rank completes."""
        with contextlib.ExitStack() as stack:
            folder = final.with_name(final.name + rundir.PARTIAL_SUFFIX)
            if self.args.should_save:
                stack.enter_context(rundir.whole_directory(final))
            self.accelerator.wait_for_everyone()
            self._write_state(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.seal(folder)

    def _write_state(self, folder: Path) -> None:
        if self.args.should_save:
            self._save(str(folder))
            write_base(self.model, folder, self.recipe)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.stateful_callbacks = {
                type(callback).__name__: callback.state()
                for callback in [*self.callback_handler.callbacks, self.control]
                if hasattr(callback, "state")
            }
            self.state.save_to_json(str(folder / "trainer_state.json"))
        meters = self.accelerator.gather(self.meter.window[None]) if self.accelerator.num_processes > 1 else None
        if self.args.should_save:
            ranks = self.accelerator.num_processes
            state = {**self.meter.state(), "last_evaluation": self.last_evaluation}
            state |= {"ranks": ranks, "stopped_early": self._stops_early(), "base": self._base}
            if meters is not None:
                state["window_by_rank"] = meters.tolist()
            (folder / checkpoint.STATE).write_text(json.dumps(state), encoding="utf-8")

    def _init_training_state(self, max_steps: int, *more: Any) -> Any:
        """Take the intervals of logging, evaluating and saving from the settings: a checkpoint holds the old ones."""
        found = super()._init_training_state(max_steps, *more)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the state from the disk into the host's memory, and set the rate by the schedule.

        With several ranks Hugging Face would put all of it on the device at once, where state that waits on the host
        has no room. Mapped, it takes no memory for each rank. The saved rate is the old schedule's, which may have
        ended at zero.
        """
        if checkpoint is None:
            return
        folder, mapped = Path(checkpoint), self.args.device.type != "cpu"
        self.optimizer.load_state_dict(
            torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=mapped)
        )
        schedule = self.lr_scheduler
        schedule.load_state_dict(torch.load(folder / SCHEDULER_NAME, map_location="cpu", weights_only=True))
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return
        for group, peak, factor in zip(
            self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = peak * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what the metrics show

    def load_counts(self, folder: Path) -> None:
        """Go on counting from a checkpoint."""
        state = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))
        if (evaluated := state.pop("last_evaluation")) is not None:
            self.last_evaluation = (evaluated[0], evaluated[1])
        if state.pop("base", None) != self._base:
            what = f"{folder.name} was trained upon other quantised weights than these"
            fix = f"restore {rundir.CODES} in {self.directory} from a copy, or start a new run"
            raise RunError(Problem("resume-base", what, why="an adapter mends the errors of its own base", fix=fix))
        by_rank, _, _ = state.pop("window_by_rank", None), state.pop("ranks"), state.pop("stopped_early")
        if by_rank is not None:
            state["window"] = by_rank[self.args.process_index]
        self.meter.load(state)
        # Hugging Face restores callbacks only together with its control, which may say that the run was to stop.
        saved = TrainerState.load_from_json(str(folder / "trainer_state.json")).stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and type(callback).__name__ in saved:
                vars(callback).update(saved[type(callback).__name__]["attributes"])

    def has_ended(self, folder: Path) -> bool:
        """Return whether a checkpoint was the run's last: killed after it, a run has only its result to write."""
        state = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))
        step = int(folder.name.rpartition("-")[2])
        return bool(state["stopped_early"]) or step >= self.planned_steps()

    def load_end(self, folder: Path) -> None:
        """Take the weights and the state of the run's last checkpoint."""
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))

    def _read_meter(self) -> dict[str, float]:
        ranks = self.accelerator.num_processes
        return self.meter.read((lambda sums: self.accelerator.reduce(sums, "sum")) if ranks > 1 else _itself, ranks)

    def close_meter(self) -> None:
        """Count the steps after the last logged line, and stop the clock."""
        self._read_meter()

    def load_best(self, folder: Path) -> None:
        """Take the weights of the best checkpoint, whose loss was measured when it was saved."""
        self._load_from_checkpoint(str(folder))
        self.last_evaluation = (self.state.global_step, float(self.state.best_metric))

    def saved_bytes(self) -> tuple[int, int]:
        """Return about how many bytes a checkpoint and the final model take on the disk."""
        tuning = plugin.tuning(self.recipe.tuning.method)
        kept = _adapter_tensors(self.model) if tuning.has_adapter else list(self.model.parameters())
        weights = checkpoint.tensor_bytes(kept)
        state_of = state_bytes_of(self.model, self.recipe)

        def of(weight: torch.Tensor, element_bytes: int) -> float:
            # The weights of a checkpoint are the average: those that are trained are saved with the state.
            average = element_bytes * weight.numel() if self.method.averages else 0
            return state_of(weight, element_bytes) + average

        state = tuning.state_bytes(self.model, self.trained, of, self.recipe.tuning.options)
        return weights + int(state), weights


def _adapter_tensors(model: Any) -> list[torch.Tensor]:
    """Return what is saved of an adapter: more than its trained weights, where it has fixed or repeated ones."""
    from peft import get_peft_model_state_dict

    return list(get_peft_model_state_dict(model).values())


def _told_apart(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the sources, where there are several."""
    return names if len(names) > 1 else ()


def _itself(sums: torch.Tensor) -> torch.Tensor:
    return sums
