"""Which weights move: those of the largest squared gradients over some batches (the empirical Fisher diagonal).

Sums of squares over batches cannot be had in one pass without an accumulator of the model's size. So the passes are
made for a part of the weights at a time, as many as the largest weight has elements: at any moment there live the sums
of one part, in float32, and one gradient. It costs (weights / largest weight) x batches forward and backward passes,
once: about 50 x 16 for a model of 7B, as long as 1,200 steps of two forward passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from ftune.errors import Problem, RecipeError
from ftune.fused.rule import SLICE

Scope = Literal["global", "tensor"]
_STRETCH = 1 << 16
"""Numbers compared at once, each of which takes up to 32 bytes meanwhile."""


def most_sensitive(
    weights: list[torch.nn.Parameter],
    losses: Callable[[], Iterator[torch.Tensor]],
    *,
    density: float,
    scope: Scope,
) -> list[torch.Tensor]:
    """Return for each weight the flat places of its entries that move, ascending, int32.

    `density` of all entries, or of each weight's; those without any gradient are left out. `losses` yields, at every
    call, the losses of the same batches, each to run backward on. Raises RecipeError where no loss has a gradient.
    """
    starts = [0]
    for weight in weights:
        starts.append(starts[-1] + weight.numel())
    best = _Largest(max(1, round(density * starts[-1])), weights[0].device)
    flat = []
    for part in _parts(weights):
        sums = _summed_squares([weights[number] for number in part], weights, losses)
        for number in part:
            if scope == "tensor":
                best = _Largest(max(1, round(density * weights[number].numel())), weights[number].device)
            best.add(sums.pop(0), starts[number])
            if scope == "tensor":
                flat.append(best.places())
    places = torch.cat(flat) if flat else best.places()
    if not len(places):
        what = "no trained weight has a gradient in the calibration batches"
        fix = "look at the rows: all tokens may be masked"
        raise RecipeError(Problem("zeroth-order-calibration", what, fix=fix))
    ends = torch.tensor(starts, device=places.device)
    cuts = torch.searchsorted(places, ends).tolist()
    return [
        (places[begin:end] - start).to(torch.int32) for begin, end, start in zip(cuts, cuts[1:], starts, strict=False)
    ]


def _parts(weights: list[torch.nn.Parameter]) -> list[list[int]]:
    """Return the weights' numbers in stretches that have no more elements together than the largest weight."""
    most = max(weight.numel() for weight in weights)
    parts: list[list[int]] = [[]]
    held = 0
    for number, weight in enumerate(weights):
        if held + weight.numel() > most and parts[-1]:
            parts.append([])
            held = 0
        parts[-1].append(number)
        held += weight.numel()
    return parts


def _summed_squares(
    part: list[torch.nn.Parameter], weights: list[torch.nn.Parameter], losses: Callable[[], Iterator[torch.Tensor]]
) -> list[torch.Tensor]:
    """Return the sum over losses of the squared gradient of each weight of a part, flat, in float32."""
    sums = {id(weight): torch.zeros(weight.numel(), device=weight.device) for weight in part}

    def square(weight: torch.Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        flat, total = gradient.reshape(-1), sums[id(weight)]
        for start in range(0, len(flat), SLICE):
            piece = flat[start : start + SLICE].float()
            total[start : start + SLICE].addcmul_(piece, piece)

    with contextlib.ExitStack() as stack:
        for weight in weights:
            weight.requires_grad_(id(weight) in sums)
            stack.callback(weight.requires_grad_, True)
        for weight in part:
            stack.callback(weight.register_post_accumulate_grad_hook(square).remove)
        with torch.enable_grad():
            for loss in losses():
                if loss.requires_grad:
                    loss.backward()
    return [sums[id(weight)] for weight in part]


class _Largest:
    """The largest of many numbers above zero, and where they are; holds twice as many as it is asked for."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count = count
        self._values = torch.empty(0, device=device)
        self._places = torch.empty(0, dtype=torch.int64, device=device)
        self._least = 0.0

    def add(self, values: torch.Tensor, start: int) -> None:
        """Take numbers whose places count from `start`."""
        for begin in range(0, len(values), _STRETCH):
            piece = values[begin : begin + _STRETCH]
            found = (piece > self._least).nonzero().view(-1)
            self._values = torch.cat([self._values, piece[found]])
            self._places = torch.cat([self._places, found + (start + begin)])
            if len(self._values) > 2 * self._count:
                self._shrink()

    def _shrink(self) -> None:
        # Stable, so that of equals the first ones stay.
        kept = self._values.sort(descending=True, stable=True).indices[: self._count].sort().values
        self._values, self._places = self._values[kept], self._places[kept]
        self._least = float(self._values.min())

    def places(self) -> torch.Tensor:
        """Return the places, ascending."""
        if len(self._values) > self._count:
            self._shrink()
        return self._places
