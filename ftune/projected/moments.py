"""Adam's direction for a projected gradient, and the move that it makes."""

from __future__ import annotations

import math
from typing import Any

import torch

from ftune.fused.rounding import Rounding
from ftune.projected.options import ProjectedOptions


def direction(projected: torch.Tensor, state: dict[str, Any], options: ProjectedOptions) -> torch.Tensor:
    """Take a float32 gradient into the running means and return their step (Kingma and Ba, 2015, algorithm 1)."""
    if "exp_avg" not in state:
        # Float32 whatever the weights are; the shape is known once there is something projected.
        state.update({name: torch.zeros_like(projected) for name in ("exp_avg", "exp_avg_sq")})
    (beta1, beta2), step = options.betas, state["step"]
    state["exp_avg"].lerp_(projected, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
    size = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step)).add_(options.eps)
    return (state["exp_avg"] / (1 - beta1**step)).div_(size)


def move(part: torch.Tensor, step: torch.Tensor, group: dict[str, Any], rounding: Rounding) -> None:
    """Decay a stretch of a weight and subtract a float32 step, which is overwritten; decoupled, as in AdamW."""
    value = part.float()
    value.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step.mul_(group["lr"]))
    if value is not part:
        rounding.write(part, value)
