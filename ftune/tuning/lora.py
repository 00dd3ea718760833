"""LoRA (Hu et al., 2021): a small low-rank addition beside frozen weights."""

from __future__ import annotations

from typing import Any

from ftune.adapters.options import LoRAOptions
from ftune.plugin import Tuning


class LoRA(Tuning):
    name = "lora"
    summary = "Low-rank adapters are trained beside frozen weights."
    has_adapter = True
    frozen_base = True
    default_learning_rate = 2e-4
    learning_rate_reason = "adapters start at zero and are small: the customary rate for LoRA"
    Options = LoRAOptions

    def apply(self, model: Any, options: Any) -> Any:
        from ftune.adapters.lora import add_lora

        return add_lora(model, options)


plugin = LoRA()
