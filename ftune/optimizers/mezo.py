"""MeZO (Malladi et al., 2023): training with forward passes only, in the memory of inference."""

from __future__ import annotations

from typing import Any, Literal

from ftune.options import Options, Positive
from ftune.plugin import Gradients, Optimizer, Setting


class MeZOOptions(Options):
    """Options of MeZO."""

    eps: Positive = 1e-3
    """How far along the random direction the two losses are measured; 1e-2 is the customary one for LoRA."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How float32 results become bfloat16 weights; to nearest, steps below 1/256 of a weight are lost."""


class MeZO(Optimizer):
    name = "mezo"
    summary = "No backward pass: two losses along a random direction say how far to go; slow, in inference's memory."
    gradients = Gradients.NONE
    state_bytes_per_parameter = 0.0
    state_bytes_note = "12 bytes on the disk for each step; while a module runs, a second copy of its weights"
    default_learning_rate = 1e-6
    learning_rate_reason = "the estimate is as many times longer than the gradient as the root of the number of weights"
    default_adapter_learning_rate = 5e-5
    adapter_learning_rate_reason = "the lower of the published rates for LoRA, 5e-5 and 1e-4: its weights are few"
    default_max_grad_norm = 0.0
    max_grad_norm_reason = "what it would clip is a slope along one random direction, for which no bound is customary"
    Options = MeZOOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.zeroth.optimizer import ZerothOrder

        return ZerothOrder(
            groups, learning_rate=learning_rate, eps=options.eps, rounding=options.rounding, setting=setting
        )


plugin = MeZO()
