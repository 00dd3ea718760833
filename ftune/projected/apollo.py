"""APOLLO (Zhu et al., 2024, arXiv 2412.05270): the gradient itself, scaled as Adam would in a random projection.

R = P G with P random normal (r, m), drawn anew every `update_proj_gap` steps; A = Adam(R); each channel j of the longer
side is scaled by s_j = |A_j| / |R_j|, or the whole matrix by s = |A| / |R| (Mini); U = sqrt(scale) G diag(s). Where
|U_t| > limit |U_t-1| it is shortened to that (the norm-growth limiter); W <- W - lr U. Written from the formulas.

P is not kept: it is drawn again at each step from a seed, r m random numbers. A matrix (m, n) with m <= n keeps 8 r n
bytes of means and one number.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ftune.fused.adamw import AdamWRule
from ftune.fused.rounding import Rounding
from ftune.fused.rule import Rule, row_slices
from ftune.projected.matrix import project
from ftune.projected.moments import direction, move
from ftune.projected.options import ApolloOptions, is_projected, on_the_left

_NOTHING = 1e-30
"""A channel whose projection is shorter than this does not move: its ratio would overflow."""


class Apollo(Rule):
    """Moves hidden matrices by their scaled gradient, everything else by AdamW.

    What a group holds is said by its `hidden`; in a group without it every matrix is taken for hidden.
    """

    def __init__(self, options: ApolloOptions, seed: int) -> None:
        self.options, self.seed = options, seed
        self._plain = AdamWRule(options.betas, options.eps)
        self._generators: dict[torch.device, torch.Generator] = {}

    def fresh(self, weight: torch.Tensor) -> dict[str, Any]:
        return {"step": 0, "seed": self.seed}

    def update(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rounding: Rounding,
        shape: torch.Size,
    ) -> None:
        if not self._projects(weight, group):
            if "exp_avg" not in state:
                state.update(self._plain.fresh(weight))
            self._plain.update(weight, gradient, state, group, rounding, shape)
            return
        state["step"] += 1
        left = on_the_left(tuple(weight.shape), self.options.proj_type)
        factors = self._factors(gradient, state, left=left)
        for rows in row_slices(weight):
            scaled = gradient[rows].float() * (factors if left else factors[rows, None])
            move(weight[rows], scaled, group, rounding)

    def _factors(self, gradient: torch.Tensor, state: dict[str, Any], *, left: bool) -> torch.Tensor:
        """Return what each channel's gradient is multiplied by: (n,) for a left projection, (m,) for a right one."""
        options = self.options
        projected = project(gradient, self._projection(gradient, state, left=left), left=left)
        step = direction(projected, state, options)
        factors = ratios(step, projected, options.scale_type, left=left) * math.sqrt(options.scale)
        if options.norm_growth_limit is None:
            return factors
        squares = channel_squares(gradient, left=left)
        length = (factors.square() * squares).sum().sqrt()
        before = state.get("length", torch.zeros_like(length))
        # The first step, and one after a step of zero, have nothing to be compared with. No number leaves the device;
        # a step of zero divides by zero, and infinity is cut to 1.
        shrunk = torch.where(before > 0, (options.norm_growth_limit * before / length).clamp(max=1), 1.0)
        state["length"] = length * shrunk
        return factors * shrunk

    def _projects(self, weight: torch.Tensor, group: dict[str, Any]) -> bool:
        return group.get("hidden", True) and is_projected(tuple(weight.shape), self.options.rank)

    def _projection(self, gradient: torch.Tensor, state: dict[str, Any], *, left: bool) -> torch.Tensor:
        """Return P^T, (m, r) or (n, r), of variance 1 / r: the same on every rank, and after a resume."""
        device, rank = gradient.device, self.options.rank
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device)
        drawn = (state["step"] - 1) // self.options.update_proj_gap
        # An odd multiplier of 64 bits, so that neighbouring seeds and draws share no stream.
        generator = self._generators[device].manual_seed((state["seed"] * 0x9E3779B97F4A7C15 + drawn) % 2**63)
        found = torch.empty(gradient.shape[0 if left else 1], rank, dtype=torch.float32, device=device)
        return found.normal_(std=1 / math.sqrt(rank), generator=generator)


def ratios(step: torch.Tensor, projected: torch.Tensor, scale_type: str, *, left: bool) -> torch.Tensor:
    """Return |A_j| / |R_j| for each channel, the same for all where the scale is the tensor's."""
    along = 0 if left else 1
    taken, given = (tensor.square().sum(dim=along) for tensor in (step, projected))
    if scale_type == "tensor":
        taken, given = taken.sum().expand_as(taken), given.sum().expand_as(given)
    taken, given = taken.sqrt(), given.sqrt()
    return torch.where(given > _NOTHING, taken / given, 0.0)


def channel_squares(gradient: torch.Tensor, *, left: bool) -> torch.Tensor:
    """Return the squared length of each column of a gradient, or of each row."""
    found = torch.zeros(gradient.shape[1 if left else 0], dtype=torch.float32, device=gradient.device)
    for rows in row_slices(gradient):
        squares = gradient[rows].float().square()
        if left:
            found += squares.sum(dim=0)
        else:
            found[rows] = squares.sum(dim=1)
    return found
