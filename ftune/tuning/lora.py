"""LoRA (Hu et al., 2021): a small low-rank addition beside frozen weights."""

from __future__ import annotations

from typing import Any

from ftune.adapters.options import LoRAOptions
from ftune.adapters.rates import loraplus_rate
from ftune.plugin import Batches, Tuning, no_batches


class LoRA(Tuning):
    name = "lora"
    summary = "Low-rank adapters are trained beside frozen weights."
    has_adapter = True
    frozen_base = True
    default_learning_rate = 2e-4
    learning_rate_reason = "adapters start at zero and are small: the customary rate for LoRA"
    Options = LoRAOptions

    def apply(self, model: Any, options: Any, *, batches: Batches) -> Any:
        from ftune.adapters.lora import add_lora

        return add_lora(model, options, batches=batches)

    def save(self, model: Any, folder: Any, *, directory: Any) -> None:
        from ftune.adapters.residual import save

        save(model, folder)

    def takes_from_base(self, options: Any) -> bool:
        return str(options.init_lora_weights).startswith(("pissa", "olora"))

    def without_numbers(self, model: Any, options: Any) -> Any:
        # Every start ends in the same shapes; some ask the weights for numbers.
        return self.apply(model, options.model_copy(update={"init_lora_weights": True}), batches=no_batches)

    def learning_rate_of(self, name: str, weight: Any, learning_rate: float, options: Any) -> float:
        return loraplus_rate(name, weight, learning_rate, options)


plugin = LoRA()
