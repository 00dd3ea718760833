"""Gradient descent: what LOMO does inside backward (Lv et al., 2023, equation 1)."""

from __future__ import annotations

from typing import Any

import torch

from ftune.fused.rounding import Rounding
from ftune.fused.rule import Rule, slices


class SGDRule(Rule):
    """weight <- weight (1 - lr weight_decay) - lr gradient; no state."""

    def fresh(self, weight: torch.Tensor) -> dict[str, Any]:
        return {}

    def update(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rounding: Rounding,
        shape: torch.Size,
    ) -> None:
        rate, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]
        if weight.dtype == torch.float32:
            # The operations of torch.optim.SGD on whole tensors, and so its bits.
            if kept != 1:
                weight.mul_(kept)
            weight.add_(gradient, alpha=-rate)
            return
        for part, slope in slices(weight, gradient):
            rounding.write(part, part.float().mul_(kept).add_(slope, alpha=-rate))
