"""Gradients of several micro-batches added up where they take less of the GPU: in bfloat16, or on the host."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch

from ftune.fused.rounding import Rounding
from ftune.fused.rule import slices

Place = Literal["bfloat16", "host"]


class Gathered:
    """Sums by weight: in bfloat16, rounded by chance so that small shares are not lost, or in float32 on the host."""

    def __init__(self, place: Place, seed: int) -> None:
        self.place = place
        self._rounding = Rounding("stochastic", seed)
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        self._shares: Counter[torch.Tensor] = Counter()

    def add(self, weight: torch.Tensor, gradient: torch.Tensor, *, step: int, index: int) -> None:
        """Add one micro-batch's gradient of the weight with a number."""
        if self.place == "host":
            # Copied in the gradient's own dtype, which is what crosses the bus.
            share = gradient.cpu().float()
            self._sums[weight] = self._sums[weight].add_(share) if weight in self._sums else share
            return
        if weight not in self._sums:
            self._sums[weight] = torch.zeros_like(gradient, dtype=torch.bfloat16)
        # A stream of chance for each share: the same on every rank, and after a resume.
        self._rounding.begin(step, (index << 20) + self._shares[weight])
        self._shares[weight] += 1
        for part, share in slices(self._sums[weight], gradient):
            self._rounding.write(part, part.float().add_(share))

    def take(self, weight: torch.Tensor, *, keep: bool) -> torch.Tensor | None:
        """Return a copy of a weight's sum on its device, or the sum itself where it need not be kept."""
        found = self._sums.get(weight)
        if found is None:
            return None
        if keep:
            return found.to(weight.device, copy=True)
        del self._sums[weight], self._shares[weight]
        return found.to(weight.device)

    def clear(self) -> None:
        """Forget every sum."""
        self._sums.clear()
        self._shares.clear()
