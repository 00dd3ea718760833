"""What a run leaves on the disk while it goes on, and what it goes on from: checkpoints, whole or absent."""

from __future__ import annotations

import contextlib
import json
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME

from ftune import plugin, rundir
from ftune.errors import Problem, RunError
from ftune.models.finished import write_base
from ftune.sharding.model import whole
from ftune.sharding.saved import fill_from, saved_weights
from ftune.sharding.state import read_state, write_state
from ftune.training import checkpoint
from ftune.training.callbacks import StopOnRequest
from ftune.training.shrinking import ShrinkingTrainer
from ftune.training.state_size import state_bytes_of


class SavingTrainer(ShrinkingTrainer):
    """Writes and reads checkpoints, which any number of ranks can go on from."""

    stop: StopOnRequest | None
    last_evaluation: tuple[int, float] | None

    @abstractmethod
    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Do something beside training: off the clock, and without drawing from training's random numbers."""

    @abstractmethod
    def stop_if_weights_not_finite(self) -> None:
        """Raise RunError where weights about to be saved are not numbers."""

    @cached_property
    def _base(self) -> str | None:
        """What identifies the weights that are trained upon."""
        return plugin.tuning(self.recipe.tuning.method).fingerprint(self.model)

    @property
    def rows_per_step(self) -> int:
        """How many rows all ranks take together in a step; where batches are bounded by tokens, batches in place of
        rows."""
        rows = self.args.train_batch_size if self.recipe.training.max_tokens_per_batch is None else 1
        return int(rows * self.args.gradient_accumulation_steps * self.accelerator.num_processes)

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
        """Each rank writes what only it has into one partial folder, which the first rank completes."""
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
        with self.with_whole_weights():
            if self.args.should_save:
                self._save(str(folder))
                write_base(self.model, folder, self.recipe)
        if self.args.should_save or self.shares > 1:
            write_state(self.own_optimizer, folder, rank=self.share, ranks=self.shares)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
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
            state |= {"ranks": ranks, "rows_per_step": self.rows_per_step}
            state |= {"stopped_early": self._stops_early(), "base": self._base}
            if meters is not None:
                state["window_by_rank"] = meters.tolist()
            (folder / checkpoint.STATE).write_text(json.dumps(state), encoding="utf-8")

    def with_whole_weights(self) -> contextlib.AbstractContextManager[object]:
        """Hold on the first rank what is written of the model, where ranks share it; all have to come."""
        if not self.is_split:
            return contextlib.nullcontext()
        tuning = plugin.tuning(self.recipe.tuning.method)
        return whole(self.model, only=_adapter_tensors(self.model) if tuning.has_adapter else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Take the weights of a checkpoint; of a model that ranks share, each takes its rows."""
        if not self.is_split:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        tuning = plugin.tuning(self.recipe.tuning.method)
        named = _adapter_by_name(self.model) if tuning.has_adapter else self.model.state_dict(keep_vars=True)
        fill_from(saved_weights(Path(resume_from_checkpoint)), named)

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
            read_state(self.own_optimizer, self.method, folder, rank=self.share, ranks=self.shares, mapped=mapped)
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
        by_rank = state.pop("window_by_rank", [state["window"]])
        for name in ("ranks", "rows_per_step", "stopped_early"):
            state.pop(name, None)
        state["window"] = _window(by_rank, self.args.process_index, self.accelerator.num_processes)
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


def _adapter_by_name(model: Any) -> dict[str, torch.Tensor]:
    """Return what is saved of an adapter, by the names it is saved under: more than its trained weights, where it has
    fixed or repeated ones."""
    from peft import get_peft_model_state_dict

    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True))
    return found


def _adapter_tensors(model: Any) -> list[torch.Tensor]:
    return list(_adapter_by_name(model).values())


def _window(by_rank: list[list[float]], rank: int, ranks: int) -> list[float]:
    """Return what a rank has counted since the last logged line; of another number of ranks the first takes it all."""
    if len(by_rank) == ranks:
        return by_rank[rank]
    sums = [sum(column) for column in zip(*by_rank, strict=True)]
    return sums if rank == 0 else [0.0] * len(sums)
