"""QLoRA (Dettmers et al., 2023): LoRA beside weights that are held in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftune.adapters.options import QLoRAOptions
from ftune.adapters.rates import loraplus_rate
from ftune.plugin import Batches, Tuning, no_batches


class QLoRA(Tuning):
    name = "qlora"
    summary = "Low-rank adapters are trained beside frozen weights of 4 (or 8) bits."
    split_note = "codes of 4 and 8 bits are not split: every device has to hold all of them"
    needs = ("bitsandbytes",)
    has_adapter = True
    frozen_base = True
    quantises = True
    default_learning_rate = 2e-4
    learning_rate_reason = "the rate of QLoRA's authors for 7B and 13B; they halve it for larger models"
    Options = QLoRAOptions

    def apply(self, model: Any, options: Any, *, batches: Batches) -> Any:
        from ftune.adapters.lora import add_lora

        return add_lora(model, options, batches=batches)

    def quantization(self, options: Any) -> Mapping[str, Any] | None:
        return options.quantization()  # type: ignore[no-any-return]

    def fits_rounded_base(self, options: Any) -> bool:
        return bool(options.init_lora_weights == "loftq")

    def without_numbers(self, model: Any, options: Any) -> Any:
        # Every start ends in the same shapes; some ask the weights for numbers.
        return self.apply(model, options.model_copy(update={"init_lora_weights": True}), batches=no_batches)

    def learning_rate_of(self, name: str, weight: Any, learning_rate: float, options: Any) -> float:
        return loraplus_rate(name, weight, learning_rate, options)


plugin = QLoRA()
