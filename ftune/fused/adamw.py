"""AdamW (Loshchilov and Hutter, 2019), one tensor at a time."""

from __future__ import annotations

import math
from typing import Any

import torch

from ftune.fused.rounding import Rounding
from ftune.fused.rule import Rule, slices


class AdamWRule(Rule):
    """Two running means in float32, whatever the weights' dtype; in the operations of torch.optim.AdamW."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps = betas, eps

    def fresh(self, weight: torch.Tensor) -> dict[str, Any]:
        def zeros() -> torch.Tensor:
            return torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.preserve_format)

        return {"step": 0, "exp_avg": zeros(), "exp_avg_sq": zeros()}

    def update(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rounding: Rounding,
        shape: torch.Size,
    ) -> None:
        state["step"] += 1
        first, second = self.betas
        rate, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]
        step_size = rate / (1 - first ** state["step"])
        correction = math.sqrt(1 - second ** state["step"])
        for part, slope, mean, square in slices(weight, gradient, state["exp_avg"], state["exp_avg_sq"]):
            slope = slope.float()
            mean.lerp_(slope, 1 - first)
            square.mul_(second).addcmul_(slope, slope, value=1 - second)
            size = (square.sqrt() / correction).add_(self.eps)
            value = part if part.dtype == torch.float32 else part.float()
            value.mul_(kept).addcdiv_(mean, size, value=-step_size)
            if value is not part:
                rounding.write(part, value)
