"""Adafactor (Shazeer and Stern, 2018) inside backward: the settings of `adafactor`, and no gradients to keep."""

from __future__ import annotations

from typing import Any

from ftune.options import FactoredOptions, Flag, FusedOptions
from ftune.plugin import Gradients, Optimizer, Setting, Sharding, TrainedTensor


class AdafactorFusedOptions(FactoredOptions, FusedOptions):
    """Options of Adafactor inside backward."""

    scale_parameter: Flag = False
    """Multiply the step by the weights' own root mean square, as `adalomo` does."""


class AdafactorFused(Optimizer):
    name = "adafactor_fused_backward"
    summary = "Adafactor inside backward: its quality, and each gradient is freed as soon as it is used."
    sharding = Sharding.SUMS
    whole_state = frozenset({"exp_avg_sq_col"})
    computes = "adafactor"
    gradients = Gradients.FUSED
    state_bytes_per_parameter = 0.0
    state_bytes_note = "4 bytes per row and per column of a matrix, 4 per element of a vector"
    default_learning_rate = 5e-5
    learning_rate_reason = "the usual range for decoder models; 1e-3 is for T5-like ones"
    default_max_grad_norm = 0.0
    max_grad_norm_reason = "Adafactor clips each tensor's update itself (clip_threshold)"
    Options = AdafactorFusedOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of the statistics."""
        return float(options.statistics_bytes(tensor.shape))

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.fused.adafactor import AdafactorRule, alone
        from ftune.fused.engine import fused

        rule = AdafactorRule(
            eps=options.eps,
            clip_threshold=options.clip_threshold,
            decay_rate=options.decay_rate,
            scale_parameter=options.scale_parameter,
            add_up=setting.add_up or alone,
        )
        return fused(groups, rule, learning_rate, options, setting)


plugin = AdafactorFused()
