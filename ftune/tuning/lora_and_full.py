"""LoRA beside weights that are trained too (Lv et al., 2023, section 4.3), folded into them at the end."""

from __future__ import annotations

from typing import Any

from ftune.adapters.options import LoRAOptions
from ftune.plugin import Batches, Tuning


class LoRAAndFull(Tuning):
    name = "lora_and_full"
    summary = "Every weight is trained, and a low-rank adapter beside them, which is folded in at the end."
    folds = True
    Options = LoRAOptions

    def apply(self, model: Any, options: Any, *, batches: Batches) -> Any:
        from ftune.adapters.beside import add_beside

        return add_beside(model, options, batches=batches)

    def adapter_weights(self, model: Any) -> list[Any]:
        from ftune.adapters.beside import adapter_weights

        return adapter_weights(model)

    def finished(self, model: Any) -> Any:
        from ftune.adapters.beside import fold

        return fold(model)


plugin = LoRAAndFull()
