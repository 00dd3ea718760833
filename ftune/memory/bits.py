"""Bases in few bits (bitsandbytes) without numbers: the library's own layers, around weights that are only sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ftune.memory.tracked import Tracked

_PAGED_ELEMENTS = 100_000
"""From so many on, the library pages a tensor of state."""


def quantise(model: Any, quantization: Mapping[str, Any]) -> None:
    """Put the library's layers into a model on `meta`, as transformers does before it reads the weights."""
    from bitsandbytes import nn
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    dtype = model.dtype
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**quantization), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    for layer in model.modules():
        if isinstance(layer, (nn.Linear4bit, nn.Linear8bitLt)):
            # The library makes its layers in float32, and the weights that are read into them are the model's.
            for tensor in layer.parameters():
                tensor.data = tensor.data.to(dtype)


def pack(model: Any) -> None:
    """Give each such layer what quantising leaves of its weight; within `numberless`."""
    from bitsandbytes import functional, nn

    maps = dict(functional.name2qmap)  # one for the process, which must not be left fake
    for layer in model.modules():
        if isinstance(layer, nn.Linear4bit):
            _pack_4bit(layer, functional)
        elif isinstance(layer, nn.Linear8bitLt):
            _pack_8bit(layer)
    functional.name2qmap.clear()
    functional.name2qmap.update(maps)


def _pack_4bit(layer: Any, functional: Any) -> None:
    old = layer.weight
    packed, state = functional.quantize_4bit(
        torch.empty(layer.out_features, layer.in_features, dtype=old.dtype),
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    )
    # Not the library's own class of parameters, which cannot be made of a fake tensor.
    weight: Any = torch.nn.Parameter(packed, requires_grad=False)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
        setattr(weight, name, getattr(old, name))
    weight.bnb_quantized, weight.quant_state = True, state
    layer._parameters["weight"], layer.quant_state = weight, state


def _pack_8bit(layer: Any) -> None:
    codes = torch.empty(layer.out_features, layer.in_features, dtype=torch.int8)
    weight: Any = torch.nn.Parameter(codes, requires_grad=False)
    weight.CB, weight.SCB = weight.data, torch.empty(layer.out_features, dtype=torch.float32)
    weight.has_fp16_weights = layer.state.has_fp16_weights
    layer._parameters["weight"] = weight


@contextlib.contextmanager
def paged_on_host(tracked: Tracked) -> Iterator[None]:
    """Take the state that the library pages for memory of the host, where the GPU runs short."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    made = Optimizer8bit.get_state_buffer

    def buffer(optimizer: Any, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with tracked.hosting() if weight.numel() >= _PAGED_ELEMENTS else contextlib.nullcontext():
            return made(optimizer, weight, dtype=dtype)  # type: ignore[no-any-return]

    Optimizer8bit.get_state_buffer = buffer
    try:
        yield
    finally:
        Optimizer8bit.get_state_buffer = made
