"""Stochastic gradient descent, PyTorch's own."""

from __future__ import annotations

from typing import Any

from ftune.options import Flag, Fraction, Options
from ftune.plugin import Optimizer, Setting, Sharding, TrainedTensor


class SGDOptions(Options):
    """Options of SGD."""

    momentum: Fraction = 0.0
    """Weight of the previous direction; above 0 it costs 4 bytes per weight."""
    nesterov: Flag = False
    """Look ahead along the momentum."""


class SGD(Optimizer):
    name = "sgd"
    summary = "Plain gradient descent: no state without momentum, and a learning rate 10 to 100 times AdamW's."
    sharding = Sharding.ROWS
    state_bytes_per_parameter = 0.0
    state_bytes_note = "4 bytes with momentum"
    default_learning_rate = 1e-2
    learning_rate_reason = "SGD does not normalise the gradient, so it needs far larger steps than AdamW"
    Options = SGDOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of the momentum, in the weights' dtype."""
        return tensor.element_bytes * tensor.elements if options.momentum else 0.0

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        import torch

        # PyTorch's SGD adds the decay to the gradient, and so to the momentum; here it is decoupled, as in AdamW.
        apart = [{**group, "weight_decay": 0.0, "decoupled_decay": group.get("weight_decay", 0.0)} for group in groups]
        optimizer = torch.optim.SGD(apart, lr=learning_rate, momentum=options.momentum, nesterov=options.nesterov)
        optimizer.register_step_pre_hook(_decay)
        return optimizer


def _decay(optimizer: Any, _arguments: Any, _keywords: Any) -> None:
    import torch

    with torch.no_grad():
        for group in optimizer.param_groups:
            factor = 1 - group["lr"] * group["decoupled_decay"]
            for weight in group["params"]:
                if weight.grad is not None and factor != 1:
                    weight.mul_(factor)


plugin = SGD()
