"""Codes chosen with the layer's inputs in view: GPTQ (Frantar et al., 2022, arXiv 2210.17323).

Columns are rounded from left to right. What rounding one of them adds to the layer's output is taken back, as far as it
can be, by the columns that are still free: with H = X X^T and U the upper Cholesky factor of its inverse,

    W[:, j:] -= (w_j - w~_j) / U[j, j]  U[j, j:]                    (algorithm 1)

Each group gets its scale and offset when its turn comes, from its weights as they then are. Columns keep their order
(no "act order"), so that a group is consecutive inputs.
"""

from __future__ import annotations

import torch

from ftune.errors import Problem, RunError
from ftune.quantized.codes import GroupCodes, require_groups
from ftune.quantized.minmax import in_groups, nearest, span

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean; the paper's."""


class InputHessian:
    """H = X X^T of a layer's inputs, gathered batch by batch; costs in_features ** 2 float32 numbers."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take inputs (..., in_features)."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)
        self.count += len(rows)

    def mean(self) -> torch.Tensor:
        return self.sum / max(1, self.count)


def fit_gptq(
    weight: torch.Tensor, bits: int, group_size: int, *, hessian: torch.Tensor, damping: float = DAMPING
) -> GroupCodes:
    """Return the codes of a weight (out_features, in_features), given H (in_features, in_features) of its inputs.

    Raises RunError where H has no Cholesky factor however much it is damped.
    """
    require_groups(weight.shape[1], group_size)
    weight = in_groups(weight, weight.shape[1])[:, 0].clone()
    factor = _inverse_factor(hessian.to(weight.dtype), damping)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales, offsets = [], []
    for start in range(0, weight.shape[1], group_size):
        group = slice(start, start + group_size)
        free, within = weight[:, group], factor[group, group]
        scale, offset = span(free[:, None], bits)
        errors = torch.empty_like(free)
        for j in range(group_size):
            column = free[:, j : j + 1]
            code = nearest(column[:, None], scale, offset, bits)[:, 0]
            codes[:, start + j : start + j + 1] = code
            errors[:, j : j + 1] = (column - (scale * code + offset)) / within[j, j]
            free[:, j + 1 :] -= errors[:, j : j + 1] * within[j, j + 1 :]
        # The columns beyond the group are moved once for the whole of it: they are not looked at before.
        weight[:, start + group_size :] -= errors @ factor[group, start + group_size :]
        scales.append(scale)
        offsets.append(offset)
    return GroupCodes.of(codes, torch.cat(scales, dim=1), torch.cat(offsets, dim=1), bits)


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor of H^-1; damping grows tenfold until there is one."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    # An input that was always 0 says nothing of its weights: they are rounded by themselves and move no others.
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean()
    for share in (damping, 10 * damping, 100 * damping):
        attempt = damped.clone()
        attempt.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(attempt)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    why = "the inputs of a layer are not numbers, or are all but the same"
    fix = "look at the calibration rows, or set tuning.fit: hqq, which needs none"
    raise RunError(Problem("gptq-inputs", "GPTQ cannot weigh the errors of a layer", why=why, fix=fix))
