"""LOMO (Lv et al., 2023): gradient descent inside backward, with one gradient alive at a time."""

from __future__ import annotations

from typing import Any

from ftune.options import AdapterRate, FusedOptions
from ftune.plugin import Gradients, Optimizer, Setting, Sharding, TrainedTensor


class LOMOOptions(FusedOptions, AdapterRate):
    """Options of LOMO."""


class LOMO(Optimizer):
    name = "lomo"
    summary = "Gradient descent inside backward: no state, and each gradient is freed as soon as it is used."
    sharding = Sharding.ROWS
    gradients = Gradients.FUSED
    state_bytes_per_parameter = 0.0
    default_learning_rate = 1e-2
    learning_rate_reason = "the gradient is not normalised, so it needs far larger steps than AdamW"
    default_max_grad_norm = 1.0
    max_grad_norm_reason = "without clipping only small rates are stable; the norm costs a second backward"
    Options = LOMOOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of AdamW's means of an adapter; weights have no state."""
        return float(options.adapter_state_bytes_per_parameter * tensor.elements) if tensor.adapter else 0.0

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.fused.beside import beside_adapter
        from ftune.fused.engine import fused
        from ftune.fused.sgd import SGDRule

        groups, rule = beside_adapter(groups, SGDRule(), options)
        return fused(groups, rule, learning_rate, options, setting)


plugin = LOMO()
