"""Perturbing every weight without a copy of the model: each module has its weights moved while its forward runs.

Only the modules that run at that moment hold a second copy of their weights. What comes back is the storage itself that
was put aside, so nothing drifts, in no dtype. In-place perturbation, MeZO's own, drifts
with every rounding of 16-bit weights. It costs one drawing of z for each micro-batch and point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ftune.errors import Problem, RecipeError
from ftune.zeroth.points import Points

_HOLDERS = (torch.nn.ParameterDict, torch.nn.ParameterList, torch.nn.ModuleDict, torch.nn.ModuleList)
"""Modules without a forward: what holds them reads their weights."""


class ThroughModules:
    """Moves each weight to a point for as long as a module that owns it runs."""

    def __init__(self, model: torch.nn.Module, weights: list[torch.nn.Parameter], points: Points) -> None:
        self._points, self._weights = points, weights
        self._numbers = {id(weight): number for number, weight in enumerate(weights)}
        self._names = {id(weight): name for name, weight in model.named_parameters()}
        self._owners = _owners(model, self._numbers)
        self._depth = [0] * len(weights)
        self._aside: dict[int, torch.Tensor] = {}
        self._seen: set[int] = set()
        self._modules = list(model.modules())
        self._watched = False

    def measure(self, loss_of: Callable[[], torch.Tensor], *, seed: int, distance: float) -> torch.Tensor:
        """Return the loss at theta + distance z.

        The first forward is watched. A weight that another module reads than the one that owns it (a fused kernel takes
        the matrices of its layers) is from then on moved while that one runs, and the forward is made again. Raises
        RecipeError where a trained weight is read outside of all modules, where it would be seen unmoved, or never.
        """
        while not self._watched:
            watch = _Watch(self._unmoved)
            with watch.following(self._modules), self._at(seed, distance), watch:
                loss = loss_of()
            self._require_moved(watch.read)
            self._watched = not watch.read
            for number, module in watch.read:
                self._owners.setdefault(module, set()).add(number)
            if self._watched:
                return loss
        with self._at(seed, distance):
            return loss_of()

    @contextlib.contextmanager
    def _at(self, seed: int, distance: float) -> Iterator[None]:
        self._seen.clear()
        with contextlib.ExitStack() as stack:
            stack.callback(self._restore)
            for module, numbers in self._owners.items():
                enter, leave = self._entering(sorted(numbers), seed, distance), self._leaving(sorted(numbers))
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def _restore(self) -> None:
        """Put back what an error left moved."""
        for number in list(self._aside):
            self._put_back(number)
        self._depth = [0] * len(self._weights)

    def _entering(self, numbers: list[int], seed: int, distance: float) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            for number in numbers:
                # A weight that two modules share, one inside the other, is moved once.
                self._depth[number] += 1
                if self._depth[number] == 1:
                    self._seen.add(number)
                    self._move(number, seed, distance)

        return enter

    def _leaving(self, numbers: list[int]) -> Callable[..., None]:
        def leave(*_: Any) -> None:
            for number in numbers:
                self._depth[number] -= 1
                if self._depth[number] == 0 and number in self._aside:
                    self._put_back(number)

        return leave

    @torch.no_grad()
    def _move(self, number: int, seed: int, distance: float) -> None:
        weight = self._weights[number].data
        moved = torch.empty_like(weight)
        flat = moved.view(-1)
        for where, values in self._points.at(weight, None, seed=seed, number=number, distance=distance):
            flat[where] = values
        self._aside[number] = weight
        self._weights[number].data = moved

    def _put_back(self, number: int) -> None:
        self._weights[number].data = self._aside.pop(number)

    def _unmoved(self, value: Any) -> int | None:
        """Return the number of a trained weight that is not moved now; None of anything else."""
        number = self._numbers.get(id(value))
        return number if number is not None and not self._depth[number] else None

    def _require_moved(self, read: set[tuple[int, torch.nn.Module | None]]) -> None:
        # A module that has it moved already and still reads it unmoved does so before its forward: no end otherwise.
        wrong = sorted(number for number, reader in read if reader is None or number in self._owners.get(reader, ()))
        what = "is read by the loss itself, outside of the model's layers"
        why = "only what a layer reads is moved there; the loss would be that of other weights"
        fix = "use another optim"
        if not wrong:
            known = self._seen | {number for number, _ in read}
            wrong = [number for number in range(len(self._weights)) if number not in known]
            what, why = "takes no part in the loss", "it would only be moved at random"
            fix = "freeze it: tuning.method: lora, with target_modules that the rows pass through"
        if wrong:
            names = [self._names[id(self._weights[number])] for number in wrong]
            more = f" (and {len(names) - 1} more)" if names[1:] else ""
            raise RecipeError(Problem("zeroth-order-reads", f"the weight `{names[0]}`{more} {what}", why=why, fix=fix))


class _Watch(TorchFunctionMode):
    """Notes which trained weights an operation reads while they are not moved, and the module that runs it."""

    def __init__(self, unmoved: Callable[[Any], int | None]) -> None:
        super().__init__()
        self._unmoved = unmoved
        self._running: list[torch.nn.Module] = []
        self.read: set[tuple[int, torch.nn.Module | None]] = set()

    @contextlib.contextmanager
    def following(self, modules: list[torch.nn.Module]) -> Iterator[None]:
        """Know which module runs."""

        def enter(module: torch.nn.Module, *_: Any) -> None:
            self._running.append(module)

        def leave(*_: Any) -> None:
            self._running.pop()

        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = _flat([*args, *(kwargs or {}).values()])
        found = {number for value in values if (number := self._unmoved(value)) is not None}
        result = function(*args, **(kwargs or {}))
        # Its shape, dtype and device may be asked for; `new_zeros` and `empty_like` take no more.
        name = getattr(function, "__name__", "")
        makes_tensors = any(isinstance(value, torch.Tensor) for value in _flat([result]))
        if makes_tensors and not name.startswith("new_") and not name.endswith("_like"):
            reader = self._running[-1] if self._running else None
            self.read |= {(number, reader) for number in found}
        return result


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _owners(model: torch.nn.Module, numbers: dict[int, int]) -> dict[torch.nn.Module, set[int]]:
    """Return the modules whose forward reads trained weights, each with their numbers."""
    modules = dict(model.named_modules())
    found: dict[torch.nn.Module, set[int]] = {}
    for name, module in modules.items():
        own = {numbers[id(weight)] for weight in module._parameters.values() if id(weight) in numbers}
        reader = name
        while own and reader and isinstance(modules[reader], _HOLDERS):
            reader = reader.rpartition(".")[0]
        if own:
            found.setdefault(modules[reader], set()).update(own)
    return found
