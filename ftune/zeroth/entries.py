"""Perturbing chosen entries of weights: moved in place for the whole forward, and put back from their saved values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from ftune.zeroth.points import Points


class InPlace:
    """Moves the chosen entries of each weight; their old values, two or four bytes each, are kept meanwhile."""

    def __init__(self, weights: list[torch.nn.Parameter], points: Points) -> None:
        self._weights, self._points = weights, points
        self.chosen: list[torch.Tensor | None] = [None] * len(weights)

    def measure(self, loss_of: Callable[[], torch.Tensor], *, seed: int, distance: float) -> torch.Tensor:
        """Return the loss at theta + distance z, whoever reads the weights."""
        with self._at(seed, distance):
            return loss_of()

    @contextlib.contextmanager
    def _at(self, seed: int, distance: float) -> Iterator[None]:
        aside: list[torch.Tensor] = []
        try:
            for number, (weight, chosen) in enumerate(zip(self._weights, self.chosen, strict=True)):
                flat = weight.data.view(-1)
                aside.append(flat.clone() if chosen is None else flat[chosen.long()])
                for where, values in self._points.at(weight.data, chosen, seed=seed, number=number, distance=distance):
                    flat[where] = values
            yield
        finally:
            for weight, chosen, old in zip(self._weights, self.chosen, aside, strict=False):
                weight.data.view(-1)[slice(None) if chosen is None else chosen.long()] = old
