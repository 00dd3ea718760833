"""Stochastic gradient descent, PyTorch's own."""

from __future__ import annotations

from typing import Any

from ftune.options import Flag, Number, Options
from ftune.plugin import Optimizer


class SGDOptions(Options):
    """Options of SGD."""

    momentum: Number = 0.0
    """Weight of the previous direction; above 0 it costs 4 bytes per weight."""
    nesterov: Flag = False
    """Look ahead along the momentum."""


class SGD(Optimizer):
    name = "sgd"
    summary = "Plain gradient descent: no state without momentum, and a learning rate 10 to 100 times AdamW's."
    state_bytes_per_parameter = 0.0
    state_bytes_note = "4 bytes with momentum"
    default_learning_rate = 1e-2
    learning_rate_reason = "SGD does not normalise the gradient, so it needs far larger steps than AdamW"
    Options = SGDOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, device_type: str) -> Any:
        import torch

        return torch.optim.SGD(groups, lr=learning_rate, momentum=options.momentum, nesterov=options.nesterov)


plugin = SGD()
