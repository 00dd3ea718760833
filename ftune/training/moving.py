"""How weights move: the recipe's optimizer and schedule, and the step that its kind of gradients needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, get_scheduler

from ftune import plugin
from ftune.data.batches import PlannedBatches, batches_of
from ftune.data.sequences import Sequences
from ftune.recipe.schema import Recipe
from ftune.sharding.model import add_up, all_finite, clip, is_split
from ftune.sharding.moved import Moved
from ftune.training.steps import STEPS


class MovingTrainer(Trainer):  # type: ignore[misc]
    """Hugging Face's Trainer with ftune's optimizers, whatever they make of gradients."""

    recipe: Recipe
    directory: Path
    is_split: bool
    """Whether ranks share each weight; otherwise each has all of it."""
    shares: int
    """How many ranks share the optimizer's state of each weight."""
    share: int
    """Which of them this is."""

    def prepare_to_move(self) -> None:
        """Take from the trainer what the optimizer does itself; called once, before anything is built."""
        # Noted before the first step: where weights move in turn, only those of the coming step require a gradient.
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.is_split = any(is_split(weight) for weight in self.model.parameters())
        shared = self.recipe.distributed.zero_stage > 0
        self.shares = self.accelerator.num_processes if shared else 1
        self.share = self.args.process_index if shared else 0
        on_host = self.recipe.distributed.offload_optimizer == "cpu"
        self._moved = Moved(rank=self.share, ranks=self.shares, on_host=on_host)
        if self._reduces_itself:
            # Not wrapped: DistributedDataParallel keeps every gradient, wants the same weights trained each time, and
            # has ranks wait for each other inside backward, where one may fail.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        if self.method.gradients in STEPS:
            self._step = STEPS[self.method.gradients]()
            self.accelerator.scaler = None  # it scales the loss itself, and could not unscale gradients that are gone

    @property
    def method(self) -> plugin.Optimizer:
        """What the recipe's optimizer declares of itself."""
        return plugin.optimizer(self.recipe.optimizer.method)

    @property
    def _reduces_itself(self) -> bool:
        """Whether gradients are averaged otherwise than by DistributedDataParallel."""
        training, tuning = self.recipe.training, plugin.tuning(self.recipe.tuning.method)
        own = self.method.gradients in STEPS or tuning.rotates or training.on_out_of_memory == "shrink"
        return own or self.is_split

    def one_pass(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Return a batch's share of the step's loss, having made of its gradient what the optimizer wants."""
        if self.method.gradients in STEPS:
            return self._step(self, model, inputs, num_items_in_batch)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def average_gradients(self) -> None:
        """Average over the ranks what DistributedDataParallel, where it is in use, has averaged already."""
        averaged = self.is_split or self.method.gradients in STEPS or not self._reduces_itself
        if averaged or self.accelerator.num_processes == 1:
            return
        for weight in self.model.parameters():
            if weight.grad is not None:
                weight.grad.copy_(self.accelerator.reduce(weight.grad, "mean"))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the recipe's optimizer over the trained weights; biases and norms are not decayed."""
        if self.optimizer is None:
            training = self.recipe.training
            chosen = self.recipe.optimizer
            setting = plugin.Setting(
                model=self.model,
                device_type=self.args.device.type,
                seed=training.seed,
                max_grad_norm=training.max_grad_norm,
                scales_loss=self.args.fp16,
                directory=self.directory,
                add_up=add_up if self.is_split else None,
                rank=self.share,
            )
            build = functools.partial(
                self.method.build, learning_rate=training.learning_rate, options=chosen.options, setting=setting
            )
            groups = self._groups()
            tuning, options = plugin.tuning(self.recipe.tuning.method), self.recipe.tuning.options
            if tuning.rotates:
                steps = self.steps_per_epoch()
                self.optimizer = tuning.rotating(
                    self.model, groups, build, options, seed=training.seed, steps_per_epoch=steps
                )
            else:
                self.optimizer = build(groups)
            # After clipping, which goes over the model's own gradients.
            self.optimizer.register_step_pre_hook(lambda *_: self._moved.take_gradients())
            self.optimizer.register_step_post_hook(lambda *_: self._moved.moved())
        return self.optimizer

    def _groups(self) -> list[dict[str, Any]]:
        """Return the trained weights by part, rate and decay.

        Those of the recipe's own rate do not name it, and come first: the metrics show the rate of the first.
        """
        training, own = self.recipe.training, self.recipe.training.learning_rate
        tuning, options = plugin.tuning(self.recipe.tuning.method), self.recipe.tuning.options
        beside = {id(weight) for weight in tuning.adapter_weights(self.model)}
        decayed = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[bool, bool, bool, float], list[torch.Tensor]] = {}
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                rate = tuning.learning_rate_of(name, weight, own, options)
                key = (rate != own, id(weight) in beside, name not in decayed, rate)
                groups.setdefault(key, []).append(weight if self.method.gradients in STEPS else self._moved.of(weight))
        return [
            {
                "params": weights,
                "weight_decay": 0.0 if spared else training.weight_decay,
                "adapter": adapter,
                **({"lr": rate} if other else {}),
            }
            for (other, adapter, spared, rate), weights in sorted(groups.items(), key=lambda group: group[0])
        ]

    @property
    def own_optimizer(self) -> Any:
        """The optimizer itself, which accelerate wraps."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule; of an optimizer that moves weights in turn, those of one sweep share a rate."""
        each = getattr(self.own_optimizer, "steps_per_rate", 1)
        if each == 1 or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        schedule = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=math.ceil(self.args.get_warmup_steps(num_training_steps) / each),
            num_training_steps=math.ceil(num_training_steps / each),
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        factors = [functools.partial(_of_sweep, factor, each) for factor in schedule.lr_lambdas]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.own_optimizer, factors)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: Any) -> Any:
        """Return the gradient norm; an optimizer that keeps none has clipped and measured it itself."""
        if self.method.gradients in STEPS:
            return self.own_optimizer.grad_norm
        return clip(self.trained, self.args.max_grad_norm) if self.is_split else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.method.gradients in STEPS:
            return self.own_optimizer.grad_norm
        if self.is_split:
            return clip(self.trained, 0.0) if grad_norm is None else grad_norm
        return super()._get_grad_norm(model, grad_norm)

    def weights_are_finite(self) -> bool:
        """Return whether all trained weights are numbers, those of other ranks among them."""
        if self.is_split:
            return all_finite(self.trained, self.args.device)
        return all(bool(torch.isfinite(weight).all()) for weight in self.trained)

    @cached_property
    def planned_batches(self) -> PlannedBatches | None:
        """This rank's batches where rows are grouped by length; None where chance draws them."""
        training, rows = self.recipe.training, self.train_dataset
        if not isinstance(rows, Sequences) or not (training.group_by_length or training.max_tokens_per_batch):
            return None
        ranks = self.accelerator.num_processes
        size, most = self.args.train_batch_size, training.max_tokens_per_batch
        batches = batches_of(rows.lengths, rows=size, most_tokens=most, ranks=ranks, seed=training.seed)
        return PlannedBatches(batches, rows.lengths, rank=self.args.process_index, ranks=ranks, seed=training.seed)

    def planned_steps(self) -> int:
        """Return how many optimizer steps the run will take."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        return math.ceil(self.steps_per_epoch() * self.args.num_train_epochs)

    def steps_per_epoch(self) -> int:
        """Return how many optimizer steps see each row once; of a stream, which has no end, those of the run."""
        if (planned := self.planned_batches) is not None:
            batches = len(planned)
        elif isinstance(self.train_dataset, Sequences):
            rows = len(self.train_dataset)
            batches = math.ceil(rows / (self.args.train_batch_size * self.accelerator.num_processes))
        else:
            return int(self.args.max_steps)
        return max(1, math.ceil(batches / self.args.gradient_accumulation_steps))


def _of_sweep(factor: Callable[[int], float], steps: int, step: int) -> float:
    """Return the schedule's factor at the sweep that a step belongs to."""
    return factor(step // steps)
