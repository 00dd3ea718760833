"""Codes by the smallest and largest weight of each group: no data, one pass, and what the other fits start from."""

from __future__ import annotations

import torch

from ftune.quantized.codes import GroupCodes, require_groups


def fit_minmax(weight: torch.Tensor, bits: int, group_size: int) -> GroupCodes:
    """Return the codes of a weight (out_features, in_features); scale and offset are float32, or float64 as it is."""
    require_groups(weight.shape[1], group_size)
    grouped = in_groups(weight, group_size)
    scale, offset = span(grouped, bits)
    return GroupCodes.of(nearest(grouped, scale, offset, bits).view(weight.shape), scale, offset, bits)


def in_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return a weight (out, in) as (out, groups, group_size), in float32 at least."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return wide.reshape(weight.shape[0], -1, group_size)


def span(grouped: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and offset (out, groups) that put the smallest weight on code 0 and the largest on the last code."""
    low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
    scale = (high - low) / (2**bits - 1)
    # A group of equal weights is its offset alone; its scale is never used, and must not divide by zero.
    usable = scale >= torch.finfo(scale.dtype).tiny
    return torch.where(usable, scale, torch.ones_like(scale)), low


def nearest(grouped: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the uint8 code nearest to each weight of (out, groups, group_size)."""
    steps = (grouped - offset[..., None]) / scale[..., None]
    return steps.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
