"""Bases held in 4 or 8 bits by bitsandbytes: kept fit for training, counted, and taken back to whole numbers."""

from __future__ import annotations

from typing import Any

import torch


def keep_differentiable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference.

    On a CPU with AVX512-BF16 its first forward in evaluation mode turns each weight into a layout whose kernel has no
    gradient, for good (bitsandbytes 0.50: `Linear4bit.forward`). Training after an evaluation would then go on with
    gradients that stop at every quantised layer, and say nothing. Costs: inference on such a CPU is slower.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantised(module: torch.nn.Module) -> bool:
    """Return whether a layer's weights are bitsandbytes codes."""
    weight = getattr(module, "weight", None)
    return getattr(weight, "quant_state", None) is not None or getattr(weight, "SCB", None) is not None


def dequantised_weight(module: torch.nn.Module) -> torch.Tensor:
    """Return a quantised layer's weights as it computes with them, float32 (out, in)."""
    from bitsandbytes import functional

    weight: Any = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB).float()


def dequantised(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model with ordinary linear layers that hold what the quantised ones computed with; changes it."""
    for name, module in list(model.named_modules()):
        if is_quantised(module):
            parent, _, last = name.rpartition(".")
            with torch.device("meta"):
                plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = torch.nn.Parameter(dequantised_weight(module), requires_grad=False)
            plain.bias = module.bias
            setattr(model.get_submodule(parent), last, plain)
    if getattr(model, "is_quantized", False):
        del model.hf_quantizer, model.config.quantization_config, model.quantization_method
        model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        model._weight_conversions = None  # else save_pretrained would have them undone, which is not written
    return model.to(dtype)


def count(weight: torch.Tensor) -> int:
    """Return how many weights a tensor stands for: of 4 bits each, it holds several in one element."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()
