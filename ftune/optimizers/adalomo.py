"""AdaLomo (Lv et al., 2023): Adafactor's update inside backward, its step in proportion to each tensor's own size."""

from __future__ import annotations

from typing import Any

from ftune.options import AdapterRate, FactoredOptions, FusedOptions
from ftune.plugin import Gradients, Optimizer, Setting, Sharding, TrainedTensor


class AdaLomoOptions(FactoredOptions, FusedOptions, AdapterRate):
    """Options of AdaLomo."""


class AdaLomo(Optimizer):
    name = "adalomo"
    summary = "LOMO with a step for each element: one row and one column of statistics per matrix."
    sharding = Sharding.SUMS
    whole_state = frozenset({"exp_avg_sq_col"})
    gradients = Gradients.FUSED
    state_bytes_per_parameter = 0.0
    state_bytes_note = "4 bytes per row and per column of a matrix, 4 per element of a vector"
    default_learning_rate = 5e-4
    learning_rate_reason = "the authors' rate for instruction tuning, times each tensor's root mean square"
    default_max_grad_norm = 0.0
    max_grad_norm_reason = "each tensor's update is limited by itself (clip_threshold), in one backward"
    Options = AdaLomoOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of the statistics, or of AdamW's means of an adapter."""
        if tensor.adapter:
            return float(options.adapter_state_bytes_per_parameter * tensor.elements)
        return float(options.statistics_bytes(tensor.shape))

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.fused.adafactor import AdafactorRule, alone
        from ftune.fused.beside import beside_adapter
        from ftune.fused.engine import fused

        rule = AdafactorRule(
            eps=options.eps,
            clip_threshold=options.clip_threshold,
            decay_rate=options.decay_rate,
            scale_parameter=True,
            add_up=setting.add_up or alone,
        )
        groups, moving = beside_adapter(groups, rule, options)
        return fused(groups, moving, learning_rate, options, setting)


plugin = AdaLomo()
