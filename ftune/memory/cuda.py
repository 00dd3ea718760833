"""Operators chosen as PyTorch chooses them on a GPU, for fake tensors that are said to lie on a CPU.

A CPU build of PyTorch can run a backward pass on fake CPU tensors only. What differs on a GPU and shows in memory is
which kernel attention takes and what it keeps, that dropout keeps a mask of bytes, what autocast computes in float32,
and that optimizers go through lists of tensors at once. Written after PyTorch 2.13; private interfaces, whose loss
the tests show.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

_aten = torch.ops.aten
_MOST_FLASH = 256
"""Largest head dimension that the flash kernel takes."""

_IN_FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt"),
    *("sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm"),
    *("native_layer_norm", "group_norm", "cosine_similarity", "nll_loss", "nll_loss2d", "kl_div", "l1_loss"),
    *("binary_cross_entropy_with_logits", "dist", "renorm", "logsumexp", "softmax.int", "log_softmax.int"),
    *("cumprod", "cumsum", "sum", "sum.dim_IntList", "linalg_vector_norm", "norm.Scalar"),
)
"""What autocast computes in float32 on a GPU and leaves as it is on a CPU (ATen/autocast_mode.h)."""


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Choose operators as on a GPU, throughout the process."""
    with contextlib.ExitStack() as stack:
        library = torch.library.Library("aten", "IMPL")
        stack.callback(library._destroy)
        library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        for name in _IN_FLOAT32:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
                continue  # in float32 on a CPU too
            library.impl(name, _in_float32(name), "AutocastCPU")
        for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            module = importlib.import_module(name)
            known = module._get_foreach_kernels_supported_devices
            stack.callback(setattr, module, "_get_foreach_kernels_supported_devices", known)
            module._get_foreach_kernels_supported_devices = lambda known=known: [*known(), "cpu"]
        yield


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    head = query.shape[-1]
    scale = 1 / math.sqrt(head) if scale is None else scale
    of_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    same = head == value.shape[-1]
    if of_16_bits and attn_mask is None and same and head <= _MOST_FLASH:
        query, key, value = (_padded(each, 8) for each in (query, key, value))
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0][
            ..., :head
        ]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(groups, dim=-3) for each in (key, value))
    keeps = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
    )[0]


def _padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    short = -tensor.shape[-1] % multiple
    return functional.pad(tensor, (0, short)) if short else tensor


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return a mask as what is added to the scores, its rows as long as the kernel wants them."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    length = mask.shape[-1]
    if length % 16:
        mask = _padded(mask, 16)[..., :length]
    return mask.expand(*query.shape[:-1], key.shape[-2])


def _dropout(tensor: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if not train or p == 0 or tensor.numel() == 0:
        return tensor
    return tensor * 0 if p == 1 else torch.native_dropout(tensor, p, train)[0]


def _in_float32(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(_aten, packet), overload or "default")

    def computed(*arguments: Any, **named: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            wide = [_wide(value) for value in arguments]
            return operation(*wide, **{key: _wide(value) for key, value in named.items()})

    return computed


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
