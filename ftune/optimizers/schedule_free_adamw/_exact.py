"""The library's optimizer, going from training to evaluation and back without loss."""

from __future__ import annotations

from typing import Any

import torch
from schedulefree import AdamWScheduleFree


class ExactScheduleFree(AdamWScheduleFree):  # type: ignore[misc]
    """Holds the average in the weights after `eval()`, and the very point it trained at again after `train()`.

    The library computes the one from the other, forth and back, so that how often a run evaluates or saves would change
    its last bits, and a resumed run would differ. Here the training point is kept, and is in what a checkpoint holds.
    """

    def __init__(self, groups: list[dict[str, Any]], **more: Any) -> None:
        super().__init__(groups, **more)
        self.train()

    @torch.no_grad()
    def eval(self) -> None:
        if not self.param_groups[0]["train_mode"]:
            return
        for weight in self._moved():
            self.state[weight]["y"] = weight.clone()
        super().eval()

    @torch.no_grad()
    def train(self) -> None:
        if self.param_groups[0]["train_mode"]:
            return
        for weight in self._moved():
            weight.copy_(self.state[weight].pop("y"))
        for group in self.param_groups:
            group["train_mode"] = True

    def _moved(self) -> list[torch.Tensor]:
        return [
            weight for group in self.param_groups for weight in group["params"] if "z" in self.state.get(weight, {})
        ]
