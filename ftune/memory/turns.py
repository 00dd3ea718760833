"""Weights that move in turn: which turn holds most, and the state that all have once each has had its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from ftune.memory.tracked import Tracked
from ftune.rotation.optimizer import RotatingOptimizer
from ftune.rotation.plans import Turns

COUNTED = 3
"""The step that counts: the set's second turn, after another one's."""


class Turn(TrainerCallback):  # type: ignore[misc]
    """Lets one set of units take every other turn, after all of them have had one.

    `moves` says whether state that sleeps on the host leaves the tracked memory, as on a GPU it does.
    """

    def __init__(self, trainer: Any, tracked: Tracked, number: int, *, moves: bool) -> None:
        self._trainer, self._tracked, self._number, self._moves = trainer, tracked, number, moves
        self.count = 0
        """How many sets differ, known once training has begun."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        optimizer: RotatingOptimizer = self._trainer.own_optimizer
        sets = different(optimizer)
        self.count = len(sets)
        chosen = sets[self._number]
        if optimizer.asleep == "host":
            for part in optimizer.parts:
                if self._moves:
                    _move_to_host(part.host, self._tracked)
                _take_turn(part)
            others = [one for one in optimizer.plan.sets if one != chosen]
            optimizer.follow(Turns([chosen, *others[:1]]))
        else:
            optimizer.follow(Turns([chosen]))


def different(optimizer: RotatingOptimizer) -> list[tuple[int, ...]]:
    """Return the sets of a plan that differ in their shapes; of equal ones the lowest, whose graph is deepest."""
    found: dict[Any, tuple[int, ...]] = {}
    for one in sorted(optimizer.plan.sets):
        shapes = tuple(sorted(tuple(weight.shape) for number in one for weight in optimizer.parts[number].weights))
        found.setdefault(shapes, one)
    return list(found.values())


@torch.no_grad()
def _take_turn(part: Any) -> None:
    for weight in part.weights:
        weight.grad = torch.zeros_like(weight)
    part.step()
    for weight in part.weights:
        weight.grad = None
    part.put_away()


def _move_to_host(host: Any, tracked: Tracked) -> None:
    put_away = host._put_away
    host._device_type = "cpu"  # where fake tensors are said to lie

    def moved(tensor: torch.Tensor, path: Any) -> torch.Tensor:
        with tracked.hosting():
            return put_away(tensor, path)  # type: ignore[no-any-return]

    host._put_away = moved
    host.bring_back = _copied(host, host.bring_back)


def _copied(host: Any, bring_back: Any) -> Any:
    def back(value: Any, path: Any) -> Any:
        # Where both sides are one kind of device, PyTorch would hand out the host's own tensor.
        found = bring_back(value, path)
        return found.clone() if isinstance(found, torch.Tensor) and path in host._devices else found

    return back
