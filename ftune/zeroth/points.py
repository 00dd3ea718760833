"""The arithmetic of a step: the direction z, the two points theta +- eps z, and the move along z.

Nothing here is kept between calls: z is drawn again from the step's seed wherever it is needed, a slice at a time. The
generators are private, so that shuffling and dropout see the same chance as without us. CPU and GPU draw other numbers
from one seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ftune.fused.rounding import Kind, Rounding

_WORD = 2**64 - 1
_SLICE = 1 << 20
"""Entries computed in float32 at once. It is part of the log's format: other slices draw other numbers."""


def mixed(*numbers: int) -> int:
    """Return 64 bits in which neighbouring numbers have nothing in common (splitmix64, Steele et al., 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def step_seed(seed: int, step: int) -> int:
    """Return the 32 bits from which everything random of one step is drawn."""
    return mixed(seed, step) >> 32


class Points:
    """Reads and moves one weight at a time; `chosen` are the flat places that move, None for all of them."""

    def __init__(self, rounding: Kind) -> None:
        self._rounding = Rounding(rounding, seed=0)
        self._generators: dict[torch.device, torch.Generator] = {}

    def directions(
        self, weight: torch.Tensor, chosen: torch.Tensor | None, *, seed: int, number: int
    ) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yield places of a flat weight, and z there in float32: standard normal, the same at every call."""
        device = weight.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device)
        generator = self._generators[device].manual_seed(mixed(seed, number) >> 1)
        count = weight.numel() if chosen is None else chosen.numel()
        for start in range(0, count, _SLICE):
            size = min(_SLICE, count - start)
            where = slice(start, start + size) if chosen is None else chosen[start : start + size].long()
            yield where, torch.randn(size, generator=generator, device=device)

    def at(
        self, weight: torch.Tensor, chosen: torch.Tensor | None, *, seed: int, number: int, distance: float
    ) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yield places of a flat weight, and its values at theta + distance z, in the weight's dtype.

        In bfloat16 a distance of 1e-3 is less than half a step wherever a weight is larger than 1/4: rounded to nearest
        such a weight would stay where it is and be told nothing, however long one trains. Rounded by chance it moves by
        distance z on average, so that E[z (L+ - L-)] is the gradient again. The other point is its mirror image: were
        it rounded by chance of its own, the second derivative would no longer cancel out.
        """
        flat, stochastic = weight.view(-1), self._by_chance(weight)
        self._rounding.begin(seed, 2 * number)
        for where, z in self.directions(weight, chosen, seed=seed, number=number):
            old = flat[where]
            theta = _computed(old)
            new = torch.empty_like(old)
            if stochastic:
                self._rounding.write(new, z.mul_(abs(distance)).add_(theta))
                if distance < 0:
                    new = theta.mul_(2).sub_(new).to(old.dtype)
            else:
                new.copy_(z.to(theta.dtype).mul_(distance).add_(theta))
            yield where, new

    def move(
        self,
        weight: torch.Tensor,
        chosen: torch.Tensor | None,
        *,
        seed: int,
        number: int,
        gradient: float,
        rate: float,
        decay: float,
    ) -> None:
        """Take the step: theta -= rate (gradient z + decay theta), computed in float32."""
        flat = weight.view(-1)
        # Not the chance of the perturbation: the step would then depend on how its point was rounded.
        self._rounding.begin(seed, 2 * number + 1)
        for where, z in self.directions(weight, chosen, seed=seed, number=number):
            old = flat[where]
            theta = _computed(old)
            # Each product is rounded before it is added, so that a CPU with fused multiplication replays no other step.
            direction = z.to(theta.dtype).mul_(gradient)
            if decay:
                direction.add_(theta * decay)
            new = torch.empty_like(old)
            self._rounding.write(new, theta.sub_(direction.mul_(rate)))
            flat[where] = new

    def _by_chance(self, weight: torch.Tensor) -> bool:
        return self._rounding.kind == "stochastic" and weight.dtype == torch.bfloat16


def _computed(values: torch.Tensor) -> torch.Tensor:
    """Return a copy in the dtype that is computed in: float32, or float64 where the weights are."""
    return values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
