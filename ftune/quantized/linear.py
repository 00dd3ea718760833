"""A linear layer whose weight exists in few bits only, and through which gradients pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftune.quantized.codes import GroupCodes


class QuantizedLinear(nn.Module):
    """y = x W~^T + bias, W~ made of its codes for each forward and again for each backward.

    Between the two nothing but the codes is alive: no dense weight is kept for the gradient, at the cost of making it
    twice. Computes in the dtype of `x`, or of autocast where that is on. The codes are not trained.
    """

    def __init__(self, codes: GroupCodes, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = codes.in_features, codes.out_features, codes.bits
        self.register_buffer("packed", codes.packed)
        self.register_buffer("scale", codes.scale)
        self.register_buffer("offset", codes.offset)
        self.register_buffer("group_index", codes.group_index)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def codes(self) -> GroupCodes:
        """The weight as it is now, sharing memory with the layer."""
        return GroupCodes(self.packed, self.scale, self.offset, self.bits, self.in_features, self.group_index)

    @codes.setter
    def codes(self, codes: GroupCodes) -> None:
        if (codes.shape, codes.bits) != ((self.out_features, self.in_features), self.bits):
            raise ValueError(f"codes of {codes.shape} in {codes.bits} bits do not fit {self}")
        self.packed, self.scale, self.offset, self.group_index = (
            codes.packed,
            codes.scale,
            codes.offset,
            codes.group_index,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: torch.Tensor = _Product.apply(x, self.bits, self.packed, self.scale, self.offset, self.group_index)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantised(self) -> nn.Linear:
        """Return the layer with a float32 weight."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.codes.dequantise(), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={self.scale.shape[1]}"


class _Product(torch.autograd.Function):
    """x W~^T; its backward makes W~ anew from the codes, which live in the layer anyway."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int, *held: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(*held)
        ctx.bits, ctx.in_features = bits, x.shape[-1]
        return functional.linear(x, _weight(held, bits, x.shape[-1], x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = _weight(ctx.saved_tensors, ctx.bits, ctx.in_features, gradient.dtype)
        return (gradient @ weight, *[None] * (1 + len(ctx.saved_tensors)))


def _weight(held: tuple[Any, ...], bits: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    packed, scale, offset, group_index = held
    return GroupCodes(packed, scale, offset, bits, in_features, group_index).dequantise(dtype)


def quantise_layers(model: nn.Module, names: list[str], fit: Callable[[str, nn.Linear], GroupCodes]) -> None:
    """Put codes in the place of the named `nn.Linear` layers of a model, one by one; each dense weight is freed."""
    for name in names:
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        model.set_submodule(name, QuantizedLinear(fit(name, dense), dense.bias))
