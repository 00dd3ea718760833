"""LoRA+ (Hayou et al., 2024, arXiv 2402.12354): the factor B learns faster than A."""

from __future__ import annotations

from typing import Any

from ftune.adapters.options import AdapterOptions


def loraplus_rate(name: str, weight: Any, learning_rate: float, options: AdapterOptions) -> float:
    """Return the learning rate of one trained weight; which is fast is as in PEFT's `create_loraplus_optimizer`."""
    ratio = options.loraplus_lr_ratio
    if ratio is None:
        return learning_rate
    if "lora_embedding_" in name:
        return options.loraplus_lr_embedding
    return learning_rate * ratio if "lora_B" in name or weight.ndim == 1 else learning_rate
