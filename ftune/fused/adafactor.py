"""Adafactor without a first moment (Shazeer and Stern, 2018), which is also AdaLomo's update (Lv et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ftune.fused.rounding import Rounding
from ftune.fused.rule import Rule, row_slices

Block = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]
"""A stretch of a weight, of its gradient, and what the gradient is multiplied by."""


@dataclass(frozen=True)
class Shard:
    """One rank's rows of matrices, and part of vectors, that several ranks share."""

    ranks: int
    """Which have equal parts."""
    add_up: Callable[[torch.Tensor], torch.Tensor]
    """Return the sum of a tensor over the ranks."""


_WHOLE = Shard(1, lambda tensor: tensor)


class AdafactorRule(Rule):
    """A mean of squared gradients for each row and each column of a matrix; vectors have one for each element.

    beta2 = 1 - step ** decay_rate; u = gradient / sqrt(row * column / mean(row)); u is divided by max(1, RMS(u) /
    clip_threshold); with `scale_parameter` the rate is multiplied by max(eps[1], RMS(weight)). Computed in float32, a
    stretch of rows at a time. A float32 gradient becomes u in place; of a 16-bit one u is computed twice, once for its
    size and once to be used, so that temporaries stay at two stretches. With a `shard` each rank has some of the rows.
    """

    def __init__(
        self,
        *,
        eps: tuple[float, float],
        clip_threshold: float,
        decay_rate: float,
        scale_parameter: bool,
        shard: Shard = _WHOLE,
    ) -> None:
        self.eps, self.clip_threshold, self.decay_rate = eps, clip_threshold, decay_rate
        self.scale_parameter, self.shard = scale_parameter, shard

    def fresh(self, weight: torch.Tensor) -> dict[str, Any]:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=weight.device)

        if weight.dim() < 2:
            return {"step": 0, "exp_avg_sq": zeros(*weight.shape)}
        *leading, rows, columns = weight.shape
        return {"step": 0, "exp_avg_sq_row": zeros(*leading, rows), "exp_avg_sq_col": zeros(*leading, columns)}

    def update(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rounding: Rounding,
    ) -> None:
        state["step"] += 1
        # 1 - beta2: at the first step 1, so that no bias is to be corrected.
        new = state["step"] ** self.decay_rate
        if weight.dim() < 2:
            mean = state["exp_avg_sq"].lerp_(gradient.float().square().add_(self.eps[0]), new)
            blocks: list[Block] = [(weight, gradient, (mean.rsqrt(),))]
        else:
            rows, columns = self._factors(gradient, state["exp_avg_sq_row"], state["exp_avg_sq_col"], new)
            blocks = list(_stretches(weight, gradient, rows, columns))
        overshoot = (self._root_mean_square(_squares(blocks), weight) / self.clip_threshold).clamp_(min=1.0)
        rate: Any = group["lr"]
        if self.scale_parameter:
            squares = torch.linalg.vector_norm(weight, dtype=torch.float32).square()
            rate = rate * self._root_mean_square(squares, weight).clamp_(min=self.eps[1])
        for part, slope, factors in blocks:
            value = part.float()
            if group["weight_decay"]:
                value.mul_(1 - rate * group["weight_decay"])
            direction = slope if slope.dtype == torch.float32 else _multiplied(slope, factors)
            value.sub_(direction.mul_(rate / overshoot))
            if value is not part:
                rounding.write(part, value)

    def _factors(
        self, gradient: torch.Tensor, row: torch.Tensor, column: torch.Tensor, new: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let the means follow a gradient (..., m, n); return the factors of its rows (..., m) and columns (..., n)."""
        of_rows, of_columns = torch.empty_like(row), torch.zeros_like(column)
        every = zip(_matrices(gradient, 2), _matrices(of_rows, 1), _matrices(of_columns, 1), strict=True)
        for matrix, mean, total in every:
            for stretch in row_slices(matrix):
                square = matrix[stretch].float().square().add_(self.eps[0])
                torch.mean(square, dim=-1, out=mean[stretch])
                total.add_(square.sum(dim=-2))
        height = row.shape[-1] * self.shard.ranks
        row.lerp_(of_rows, new)
        column.lerp_(self.shard.add_up(of_columns).div_(height), new)
        of_all = self.shard.add_up(row.sum(dim=-1, keepdim=True)).div_(height)
        return (row / of_all).rsqrt_(), column.rsqrt()

    def _root_mean_square(self, squares: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (self.shard.add_up(squares) / (max(1, weight.numel()) * self.shard.ranks)).sqrt()


def _matrices(tensor: torch.Tensor, dimensions: int) -> Iterator[torch.Tensor]:
    """Yield views of a tensor's last dimensions, one for each place in the others."""
    if tensor.dim() == dimensions:
        yield tensor
    else:
        for inner in tensor:
            yield from _matrices(inner, dimensions)


def _stretches(
    weight: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> Iterator[Block]:
    every = zip(_matrices(weight, 2), _matrices(gradient, 2), _matrices(rows, 1), _matrices(columns, 1), strict=True)
    for part, slope, row, column in every:
        for stretch in row_slices(part):
            yield part[stretch], slope[stretch], (row[stretch].unsqueeze(-1), column)


def _multiplied(slope: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return a gradient times its factors in float32; a float32 one is overwritten."""
    slope = slope.float()
    for factor in factors:
        slope.mul_(factor)
    return slope


def _squares(blocks: list[Block]) -> torch.Tensor:
    """Return the sum of the squared updates; float32 gradients become the updates."""
    norms = [torch.linalg.vector_norm(_multiplied(slope, factors)) for _, slope, factors in blocks]
    return norms[0].square() if len(norms) == 1 else torch.stack(norms).square().sum()
