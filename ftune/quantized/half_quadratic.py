"""Codes whose error is small in a norm that forgives outliers: half-quadratic splitting, HQQ (Badri and Shaji, 2023).

For each group, its scale as min-max has it, minimise  sum |W - (scale Q + offset)|^p,  p < 1,  over Q and offset.
An auxiliary error E splits the problem in two that have closed forms:

    E      = shrink(W - scale Q - offset)           the part of the error taken for outliers
    offset = mean(W - scale Q - E)                  the mean of what is left

Two things differ from HQQ. Errors are measured in steps of the code, so that the shrinkage means the same for weights
of any size. A group keeps a new offset only where its own norm has fallen, so that no iteration makes anything worse.
"""

from __future__ import annotations

import torch

from ftune.quantized.codes import GroupCodes, require_groups
from ftune.quantized.minmax import in_groups, nearest, span

NORM = 0.7
"""The p of the norm; HQQ's."""
_PENALTY, _PENALTY_GROWTH = 10.0, 1.01


def fit_half_quadratic(weight: torch.Tensor, bits: int, group_size: int, *, iterations: int = 20) -> GroupCodes:
    """Return the codes of a weight (out_features, in_features); needs no data."""
    require_groups(weight.shape[1], group_size)
    grouped = in_groups(weight, group_size)
    scale, offset = span(grouped, bits)
    # In units of the scale: W / scale = Q + zero.
    steps, zero = grouped / scale[..., None], offset / scale
    one = torch.ones_like(scale)
    codes = nearest(steps, one, zero, bits)
    best, penalty = _norm(steps, codes, zero), _PENALTY
    for _ in range(iterations):
        error = steps - codes - zero[..., None]
        tried = (steps - codes - _shrink(error, penalty)).mean(dim=-1)
        tried_codes = nearest(steps, one, tried, bits)
        norm = _norm(steps, tried_codes, tried)
        better = norm < best
        zero, best = torch.where(better, tried, zero), torch.where(better, norm, best)
        codes = torch.where(better[..., None], tried_codes, codes)
        penalty *= _PENALTY_GROWTH
    return GroupCodes.of(codes.view(weight.shape), scale, zero * scale, bits)


def _norm(steps: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (steps - codes - zero[..., None]).abs().pow_(NORM).sum(dim=-1)


def _shrink(error: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return the generalised soft threshold: sign(e) max(|e| - |e|^(p-1) / penalty, 0)."""
    size = error.abs().clamp_min(torch.finfo(error.dtype).tiny)
    return error.sign() * (size - size.pow(NORM - 1) / penalty).clamp_min_(0)
