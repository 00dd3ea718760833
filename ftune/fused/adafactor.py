"""Adafactor without a first moment (Shazeer and Stern, 2018), which is also AdaLomo's update (Lv et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftune.fused.rounding import Rounding
from ftune.fused.rule import SLICE, Rule, row_slices

Stretch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Some rows of a matrix of weights, of its gradient, and what is known of these rows and of all columns."""


AddUp = Callable[[torch.Tensor], torch.Tensor]
"""Returns the sum of a tensor over the ranks that share a weight."""


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over one rank."""
    return tensor


class AdafactorRule(Rule):
    """A mean of squared gradients for each row and each column of a matrix; vectors have one for each element.

    beta2 = 1 - step ** decay_rate; u = gradient / sqrt(row * column / mean(row)); u is divided by max(1, RMS(u) /
    clip_threshold); with `scale_parameter` the rate is multiplied by max(eps[1], RMS(weight)). Computed in float32, a
    stretch of rows at a time. The size of u is that of a product of the squared gradient with both factors, so that u
    itself is made once, while it is used. Of a weight that ranks share each has some of the first dimension: `add_up`
    makes their sums one, three small ones for a tensor.
    """

    def __init__(
        self,
        *,
        eps: tuple[float, float],
        clip_threshold: float,
        decay_rate: float,
        scale_parameter: bool,
        add_up: AddUp = alone,
    ) -> None:
        self.eps, self.clip_threshold, self.decay_rate = eps, clip_threshold, decay_rate
        self.scale_parameter, self.add_up = scale_parameter, add_up

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
        shape: torch.Size,
    ) -> None:
        state["step"] += 1
        # 1 - beta2: at the first step 1, so that no bias is to be corrected.
        new = state["step"] ** self.decay_rate
        rate: Any = group["lr"]
        if self.scale_parameter:
            squares = torch.linalg.vector_norm(weight, dtype=torch.float32).square()
            rate = rate * self._root_mean_square(squares, shape).clamp_(min=self.eps[1])
        kept = 1 - rate * group["weight_decay"] if group["weight_decay"] else None
        if weight.dim() < 2:
            square = gradient.float().square()
            whole = state["exp_avg_sq"].lerp_(square + self.eps[0], new).reciprocal()
            step = rate / self._overshoot((square * whole).sum(), shape)
            _move(weight, gradient.float() * step, whole.sqrt_(), kept, rounding)
            return
        # A small matrix is squared once, of a large one a stretch for each use.
        once = gradient.float().square() if gradient.dim() == 2 and gradient.numel() <= SLICE else None
        rows, columns = self._shares(gradient, once, state["exp_avg_sq_row"], state["exp_avg_sq_col"], new, shape)
        stretches = list(_stretches(weight, gradient, rows, columns))
        squares = rows @ once @ columns if once is not None else _sum_of_squares(stretches, columns.new_zeros(()))
        step = rate / self._overshoot(squares, shape)
        columns.sqrt_()
        for part, slope, row, column in stretches:
            scale = (row.sqrt() * step).unsqueeze(-1)
            scaled = slope.mul_(scale) if slope.dtype == torch.float32 else slope * scale
            _move(part, scaled, column, kept, rounding)

    def _shares(
        self,
        gradient: torch.Tensor,
        once: torch.Tensor | None,
        row: torch.Tensor,
        column: torch.Tensor,
        new: float,
        shape: torch.Size,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let the means follow a gradient (..., m, n); return what its squares are multiplied by to be those of u.

        That is a factor for each row (..., m) and one for each column (..., n).
        """
        if once is not None:
            of_rows, of_columns = once.mean(dim=-1), once.sum(dim=-2)
        else:
            of_rows, of_columns = torch.empty_like(row), torch.zeros_like(column)
            every = zip(_matrices(gradient, 2), _matrices(of_rows, 1), _matrices(of_columns, 1), strict=True)
            for matrix, mean, total in every:
                for stretch in row_slices(matrix):
                    square = matrix[stretch].float().square()
                    torch.mean(square, dim=-1, out=mean[stretch])
                    total.add_(square.sum(dim=-2))
        # Of a stack of matrices each rank has whole ones.
        height, add_up = shape[-2], self.add_up if len(shape) == 2 else alone
        row.lerp_(of_rows.add_(self.eps[0]), new)
        column.lerp_(add_up(of_columns).div_(height).add_(self.eps[0]), new)
        of_all = add_up(row.sum(dim=-1, keepdim=True)).div_(height)
        # A row that never had a gradient has a mean of eps, beside which a large one elsewhere would be infinite.
        return (of_all / row).clamp_(max=1e30), column.reciprocal()

    def _overshoot(self, squares: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return how many times as large as allowed an update is, at least 1; `squares` is the sum of its squares."""
        return (self._root_mean_square(squares, shape) / self.clip_threshold).clamp_(min=1.0)

    def _root_mean_square(self, squares: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return (self.add_up(squares) / max(1, shape.numel())).sqrt()


def _move(
    weight: torch.Tensor, slope: torch.Tensor, factor: torch.Tensor, kept: torch.Tensor | None, rounding: Rounding
) -> None:
    """Subtract a slope times a factor from what decay keeps of a weight."""
    value = weight.float()
    if kept is not None:
        value.mul_(kept)
    value.addcmul_(slope, factor, value=-1)
    if value is not weight:
        rounding.write(weight, value)


def _matrices(tensor: torch.Tensor, dimensions: int) -> Iterator[torch.Tensor]:
    """Yield views of a tensor's last dimensions, one for each place in the others."""
    if tensor.dim() == dimensions:
        yield tensor
    else:
        for inner in tensor:
            yield from _matrices(inner, dimensions)


def _stretches(
    weight: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> Iterator[Stretch]:
    every = zip(_matrices(weight, 2), _matrices(gradient, 2), _matrices(rows, 1), _matrices(columns, 1), strict=True)
    for part, slope, row, column in every:
        for stretch in row_slices(part):
            yield part[stretch], slope[stretch], row[stretch], column


def _sum_of_squares(stretches: list[Stretch], none: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squares of u, which is not made; a rank may have no matrix of a stack."""
    return torch.stack([none, *(row @ slope.float().square() @ column for _, slope, row, column in stretches)]).sum()
