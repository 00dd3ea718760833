"""float32 copies of 16-bit weights, which an optimizer moves in their stead.

A bfloat16 weight loses every update smaller than about 1/256 of it. Its float32 copy adds them up, and the weight is
the copy rounded to nearest (Micikevicius et al., 2018, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def is_short(weight: torch.Tensor) -> bool:
    """Return whether a weight has fewer bits than float32."""
    return bool(weight.is_floating_point() and weight.dtype.itemsize < 4)


class Masters:
    """The float32 copies of those of some weights that have 16 bits."""

    def __init__(self, weights: Iterable[torch.nn.Parameter]) -> None:
        short = [weight for weight in weights if is_short(weight)]
        self.pairs = [(weight, torch.nn.Parameter(weight.detach().float())) for weight in short]
        for weight, master in self.pairs:
            master.copy_of = weight  # an optimizer that treats embeddings apart has to know its embeddings

    def in_place_of_weights(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return parameter groups in which copies stand for the weights that have one."""
        of = {id(weight): master for weight, master in self.pairs}
        return [{**group, "params": [of.get(id(weight), weight) for weight in group["params"]]} for group in groups]

    def take_gradients(self) -> None:
        """Hand each weight's gradient over to its copy, in float32."""
        for weight, master in self.pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    def write_back(self) -> None:
        """Round the copies into the weights."""
        for weight, master in self.pairs:
            weight.copy_(master)
            master.grad = None

    def tensors(self) -> list[torch.Tensor]:
        return [master.detach() for _, master in self.pairs]

    def load(self, saved: list[torch.Tensor]) -> None:
        for (_, master), value in zip(self.pairs, saved, strict=True):
            master.data.copy_(value)
