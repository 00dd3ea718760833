"""Steps without kept gradients: consumed inside backward, or never made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ftune.plugin import Gradients

if TYPE_CHECKING:
    from ftune.training.trainer import FtuneTrainer

Batch = dict[str, Any]


class FusedStep:
    """The optimizer runs backward itself, and moves each weight as soon as its gradient is there."""

    def __call__(self, trainer: FtuneTrainer, model: Any, inputs: Batch, num_items: Any) -> torch.Tensor:
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

    def __call__(self, trainer: FtuneTrainer, model: Any, inputs: Batch, num_items: Any) -> torch.Tensor:
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


STEPS: dict[Gradients, type[FusedStep | ForwardStep]] = {Gradients.FUSED: FusedStep, Gradients.NONE: ForwardStep}
