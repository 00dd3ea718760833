"""Steps without kept gradients: consumed inside backward, or never made."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from ftune.losses import IGNORED
from ftune.plugin import Gradients

Batch = dict[str, Any]


class Trainer(Protocol):
    """What a step asks of the trainer."""

    args: Any
    accelerator: Any
    recipe: Any
    objective: Any

    @property
    def own_optimizer(self) -> Any: ...

    def compute_loss(self, model: Any, inputs: Batch, *, num_items_in_batch: Any) -> Any: ...

    def compute_loss_context_manager(self) -> Any: ...

    def get_train_dataloader(self) -> Any: ...

    def aside(self) -> Any: ...

    def _prepare_inputs(self, inputs: Batch) -> Batch: ...


class FusedStep:
    """The optimizer runs backward itself, and moves each weight as soon as its gradient is there."""

    def __call__(self, trainer: Trainer, model: Any, inputs: Batch, num_items: Any) -> torch.Tensor:
        model.train()
        inputs = trainer._prepare_inputs(inputs)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=num_items)
        trainer.own_optimizer.backward(loss, last=trainer.accelerator.sync_gradients)
        return loss.detach()


class ForwardStep:
    """The optimizer asks for the loss of all micro-batches at several points, and is told no gradient."""

    def __init__(self) -> None:
        self._waiting: list[Batch] = []

    def __call__(self, trainer: Trainer, model: Any, inputs: Batch, num_items: Any) -> torch.Tensor:
        if getattr(trainer.own_optimizer, "calibration_batches", 0):
            self._calibrate(trainer, model)
        self._waiting.append(trainer._prepare_inputs(inputs))
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=trainer.args.device)
        batches, self._waiting = self._waiting, []

        def loss_of() -> torch.Tensor:
            """Return the loss of the whole step, over all ranks: each of them then learns the same."""
            with torch.no_grad(), trainer.compute_loss_context_manager():
                each = [trainer.compute_loss(model, batch, num_items_in_batch=num_items) for batch in batches]
            total = torch.stack([loss.detach().double() for loss in each]).sum()
            mean: torch.Tensor = trainer.accelerator.reduce(total, "mean")
            return mean

        # Dropout off: both points must see the same model.
        model.eval()
        loss: torch.Tensor = trainer.own_optimizer.learn(loss_of)
        model.train()
        return loss.detach().float()

    def _calibrate(self, trainer: Trainer, model: Any) -> None:
        """Let the optimizer look at the gradients of some batches, once; a resumed one has its choice already."""
        wanted = trainer.own_optimizer.calibration_batches

        def losses() -> Iterator[torch.Tensor]:
            for batch in batches:
                count = (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
                with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                    loss = trainer.objective.loss(
                        model,
                        batch,
                        num_items=count,
                        label_smoothing=trainer.recipe.training.label_smoothing_factor,
                        options=trainer.recipe.objective.options,
                    )
                yield loss

        # Layers are checkpointed in training mode only; without that, dropout stays off.
        model.train(trainer.args.gradient_checkpointing)
        with trainer.aside():
            loader = trainer.get_train_dataloader()
            batches = [trainer._prepare_inputs(batch) for batch in itertools.islice(loader, wanted)]
            loader.end()  # accelerate would take one that was not read to its end for the loader in use
            trainer.own_optimizer.calibrate(losses)


STEPS: dict[Gradients, type[FusedStep | ForwardStep]] = {Gradients.FUSED: FusedStep, Gradients.NONE: ForwardStep}
