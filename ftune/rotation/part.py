"""One unit's weights with an optimizer of their own, which can be put to sleep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftune.fused.kept import keep_state_dtypes
from ftune.rotation.host import HostMemory
from ftune.rotation.masters import Masters

Groups = list[dict[str, Any]]
Build = Callable[[Groups], torch.optim.Optimizer]


class Part:
    """An optimizer over some weights, made when they first move.

    It is the part's own, and not a share of one over all weights: whatever an optimizer counts, by weight or by group,
    counts the updates of this part.
    """

    def __init__(self, name: str, groups: Groups, build: Build, *, with_masters: bool) -> None:
        self.name = name
        self.weights = [weight for group in groups for weight in group["params"]]
        self._groups, self._build, self._with_masters = groups, build, with_masters
        self.optimizer: torch.optim.Optimizer | None = None
        self.masters: Masters | None = None
        self.host = HostMemory()
        self._away = False
        self.shown: Groups = [dict(group) for group in build(_copied(groups)).param_groups]
        """The optimizer's groups as others see them: over the weights, whatever stands in their place."""

    def set_free(self, free: bool) -> None:
        """Say whether gradients are made for these weights; those that are there go when they are not."""
        for weight in self.weights:
            weight.requires_grad_(free)
            if not free:
                weight.grad = None

    def step(self) -> None:
        """Move the weights by their gradients, at the learning rates of the shown groups."""
        optimizer = self._woken()
        for group, shown in zip(optimizer.param_groups, self.shown, strict=True):
            group["lr"] = shown["lr"]
        if self.masters is None:
            optimizer.step()
            return
        self.masters.take_gradients()
        optimizer.step()
        self.masters.write_back()

    def forget(self) -> None:
        """Drop all state: what the optimizer knew, and copies in float32."""
        self.optimizer = self.masters = None

    def put_away(self) -> None:
        """Move all state to the host; the next step brings it back."""
        if self.optimizer is not None and not self._away:
            self._move(self.host.put_away)
            self._away = True

    def _woken(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            return self._made()
        if self._away:
            self._move(self.host.bring_back)
            self._away = False
        return self.optimizer

    def _made(self) -> torch.optim.Optimizer:
        groups = _copied(self._groups)
        if self._with_masters:
            self.masters = Masters(self.weights)
            groups = self.masters.in_place_of_weights(groups)
        self.optimizer = self._build(groups)
        return self.optimizer

    def _move(self, move: Callable[[Any, tuple[Any, ...]], Any]) -> None:
        assert self.optimizer is not None
        for number, weight in enumerate(_parameters(self.optimizer)):
            if weight in self.optimizer.state:
                state = self.optimizer.state[weight]
                state.update({key: move(value, (number, key)) for key, value in state.items()})
        for number, (_, master) in enumerate(self.masters.pairs if self.masters else ()):
            master.data = move(master.data, ("master", number))

    def state_tensors(self) -> list[torch.Tensor]:
        """Return every tensor that is held beside the weights."""
        found = list(_tensors(list(self.optimizer.state.values()))) if self.optimizer else []
        return found + (self.masters.tensors() if self.masters else [])

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state, or None where nothing moved yet or all was forgotten."""
        if self.optimizer is None:
            return None
        self.host.settle()
        return {"optimizer": self.optimizer.state_dict(), "masters": self.masters.tensors() if self.masters else []}

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        self.forget()
        self._away = False
        if saved is None:
            return
        optimizer = self._made()
        if self.masters is not None:
            self.masters.load(saved["masters"])
        optimizer.load_state_dict(saved["optimizer"])
        keep_state_dtypes(optimizer, saved["optimizer"])


def _copied(groups: Groups) -> Groups:
    """Return groups that an optimizer may fill with its defaults."""
    return [dict(group) for group in groups]


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the tensors that an optimizer moves, in the order in which its saved state numbers them."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
