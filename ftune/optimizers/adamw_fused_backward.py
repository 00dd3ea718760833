"""AdamW (Loshchilov and Hutter, 2019) inside backward: its two running means, and no gradients to keep."""

from __future__ import annotations

from typing import Any

from ftune.options import Fraction, FusedOptions, NotNegative
from ftune.plugin import Gradients, Optimizer, Setting, Sharding


class AdamWFusedBackwardOptions(FusedOptions):
    """Options of AdamW inside backward."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: NotNegative = 1e-8
    """Added to the denominator."""


class AdamWFusedBackward(Optimizer):
    name = "adamw_fused_backward"
    summary = "AdamW inside backward: each gradient is freed as soon as it is used; states stay float32."
    sharding = Sharding.ROWS
    computes = "adamw"
    gradients = Gradients.FUSED
    state_bytes_per_parameter = 8.0
    state_bytes_note = "float32 for weights of 16 bits too"
    default_max_grad_norm = 0.0
    max_grad_norm_reason = "the global norm costs a second backward; clip_grad_norm_per_tensor costs none"
    Options = AdamWFusedBackwardOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.fused.adamw import AdamWRule
        from ftune.fused.engine import fused

        return fused(groups, AdamWRule(options.betas, options.eps), learning_rate, options, setting)


plugin = AdamWFusedBackward()
