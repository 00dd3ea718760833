"""A rule over kept gradients: an ordinary optimizer, which the trainer accumulates for and clips for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ftune.fused.rounding import Kind, Rounding
from ftune.fused.rule import Rule


class RuleOptimizer(torch.optim.Optimizer):
    """Moves each weight that has a gradient by a rule; its whole state is in `state_dict`."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rule: Rule,
        *,
        learning_rate: float,
        seed: int,
        rounding: Kind = "stochastic",
    ) -> None:
        self.rule, self.rounding = rule, Rounding(rounding, seed)
        self.steps = 0
        """Steps made; with the seed it decides how results are rounded."""
        super().__init__(groups, {"lr": learning_rate, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for index, (weight, group) in enumerate(self.weights()):
            if weight.grad is not None:
                self.move(index, weight, local(weight.grad), group)
        self.steps += 1
        return loss

    def weights(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """Return each weight with its group; the place in the list is the weight's number."""
        return [(weight, group) for group in self.param_groups for weight in group["params"]]

    def move(self, index: int, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        """Move one weight, or this rank's rows of it, by a gradient of the same shape."""
        part = local(weight.data)
        if weight not in self.state:
            self.state[weight] = self.rule.fresh(part)
        self.rounding.begin(self.steps, index)
        self.rule.update(part, gradient, self.state[weight], group, self.rounding, weight.shape)

    def own_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the state of each weight."""
        return {"steps": self.steps}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "own": self.own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.load_own_state(state_dict["own"])
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "own"})
        keep_state_dtypes(self, state_dict)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows of a tensor that is split over ranks, sharing their memory; else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def keep_state_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Give the state that was just loaded the dtypes it was saved with.

    PyTorch casts each state to its weight's dtype, and float32 statistics of bfloat16 weights with it: a resumed run
    would go on from others than it stopped with.
    """
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, weight in zip(numbers, weights, strict=True):
        for name, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and value.dtype != optimizer.state[weight][name].dtype:
                optimizer.state[weight][name] = value.to(weight.device, copy=True)
