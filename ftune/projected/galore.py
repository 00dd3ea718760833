"""GaLore (Zhao et al., 2024, arXiv 2403.03507): Adam on the gradient's leading singular directions.

P = the r leading singular vectors of G, made anew every `update_proj_gap` steps; R = P^T G; N = Adam(R);
W <- W - lr scale P N (algorithm 2). The running means are not turned into the new basis. A matrix (m, n) with m <= n
keeps 4 r m bytes of projection and 8 r n of means, in place of 8 m n.
"""

from __future__ import annotations

from typing import Any

import torch

from ftune.fused.adamw import AdamWRule
from ftune.fused.rounding import Rounding
from ftune.fused.rule import Rule, row_slices
from ftune.projected.matrix import project
from ftune.projected.moments import direction, move
from ftune.projected.options import GaLoreOptions, is_projected, on_the_left


class GaLore(Rule):
    """Moves hidden matrices in a projection, everything else by AdamW.

    What a group holds is said by its `hidden`; in a group without it every matrix is taken for hidden.
    """

    def __init__(self, options: GaLoreOptions) -> None:
        self.options = options
        self._plain = AdamWRule(options.betas, options.eps)

    def fresh(self, weight: torch.Tensor) -> dict[str, Any]:
        # Whether it is projected, its group says, which comes with the first gradient.
        return {"step": 0}

    def update(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rounding: Rounding,
        shape: torch.Size,
    ) -> None:
        options = self.options
        if not self._projects(weight, group):
            if "exp_avg" not in state:
                state.update(self._plain.fresh(weight))
            self._plain.update(weight, gradient, state, group, rounding, shape)
            return
        state["step"] += 1
        left = on_the_left(tuple(weight.shape), options.proj_type)
        if (state["step"] - 1) % options.update_proj_gap == 0:
            state["projection"] = leading_directions(gradient, options.rank, left=left)
        projection = state["projection"]
        step = self._direction(project(gradient, projection, left=left), state)
        for rows in row_slices(weight):
            back = projection[rows] @ step if left else step[rows] @ projection.T
            move(weight[rows], back.mul_(options.scale), group, rounding)

    def _projects(self, weight: torch.Tensor, group: dict[str, Any]) -> bool:
        return group.get("hidden", True) and is_projected(tuple(weight.shape), self.options.rank)

    def _direction(self, projected: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        return direction(projected, state, self.options)


def leading_directions(gradient: torch.Tensor, rank: int, *, left: bool) -> torch.Tensor:
    """Return the leading singular vectors of a gradient (m, n): (m, rank) of its left, (n, rank) of its right.

    A whole decomposition takes time in m^2 n for m <= n, and two more float32 copies of the gradient: on one CPU core
    0.5 s for 1024 x 1024 and 3 s for 2048 x 2048, and so about 25 s for 4096 x 4096. So it is done once in hundreds of
    steps.
    """
    whole = gradient.float()
    if not bool(whole.isfinite().all()):
        # The decomposition would raise; so the weights become NaN, and the trainer says what happened.
        return torch.eye(gradient.shape[0 if left else 1], rank, device=gradient.device)
    vectors, _, others = torch.linalg.svd(whole, full_matrices=False)
    found = vectors[:, :rank] if left else others[:rank].T
    # A singular vector's sign is the library's choice. Fixed, a step does not depend on which one decomposed.
    largest = found.gather(0, found.abs().argmax(dim=0, keepdim=True))
    return (found * largest.sign()).contiguous()
