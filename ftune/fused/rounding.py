"""How float32 results become weights of fewer bits.

Rounded to nearest, a bfloat16 weight loses every update smaller than about 1/256 of it. Rounded up or down by chance,
in proportion, it moves by the update on average (Gupta et al., 2015; for bfloat16 training Zamirai et al., 2020).
"""

from __future__ import annotations

from typing import Literal

import torch

Kind = Literal["stochastic", "nearest"]


class Rounding:
    """Writes float32 values into weights; chance is drawn from a generator of its own."""

    def __init__(self, kind: Kind, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def begin(self, step: int, tensor: int) -> None:
        """Start the chance of one tensor's update: the same on every rank, and after a resume."""
        # Odd multipliers of 64 bits, so that neighbouring steps and tensors share no stream.
        seed = (self.seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F + tensor * 0x165667B19E3779F9) % 2**63
        for generator in self._generators.values():
            generator.manual_seed(seed)
        self._now = seed

    def write(self, weight: torch.Tensor, value: torch.Tensor) -> None:
        """Store float32 `value`, which may be overwritten, as `weight`, a view of the same shape."""
        if self.kind == "stochastic" and weight.dtype == torch.bfloat16:
            value = self._rounded(value)
        weight.copy_(value)

    def _rounded(self, value: torch.Tensor) -> torch.Tensor:
        """Return a float32 tensor whose lower 16 bits, those bfloat16 lacks, are zero."""
        bits = value.contiguous().view(torch.int32)
        # Added below the cut, chance carries into the kept bits with the probability of what is cut off.
        carried = bits + self._noise(value)
        rounded = carried.bitwise_and_(-65536).view(torch.float32)
        # The carry would make a NaN of infinity, and infinity of the largest number.
        return torch.where(rounded.isfinite(), rounded, value)

    def _noise(self, value: torch.Tensor) -> torch.Tensor:
        device = value.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device).manual_seed(self._now)
        # Four numbers of 16 bits from each draw of 64: drawing is what costs.
        drawn = torch.empty((value.numel() + 3) // 4, dtype=torch.int64, device=device)
        drawn.random_(-(2**63), None, generator=self._generators[device])
        noise = drawn.view(torch.int16)[: value.numel()].to(torch.int32).bitwise_and_(65535)
        return noise.view(value.shape)
