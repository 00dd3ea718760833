"""A forward pass of a model that does not fit into memory: each module gets its weights for as long as it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from ftune.weights.skeleton import absent, filled


class Stored(Protocol):
    """Weights in files, and the modules that compute with them."""

    model: Any
    adapted: Any
    """The model with its adapter, or the model itself."""
    parts: Mapping[str, Any]

    def part_of(self, name: str) -> str | None: ...

    def stored(self, name: str) -> torch.Tensor: ...


@contextlib.contextmanager
def computing(weights: Stored) -> Iterator[Any]:
    """Yield the model with its adapter attached, not folded in; it may be called, which reads all files once.

    Memory: the adapter, activations, and the largest module in float32.
    """
    root = weights.adapted.base_model.model if weights.parts else weights.model
    open_now: dict[int, Any] = {}
    handles = []

    def watch(module: Any, base: Any, prefix: str) -> None:
        def before(_module: Any, _inputs: Any) -> None:
            context = filled(base, prefix, weights.stored)
            context.__enter__()
            open_now[id(module)] = context

        def after(_module: Any, _inputs: Any, _made: Any) -> None:
            if (context := open_now.pop(id(module), None)) is not None:
                context.__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after, always_call=True))

    for path, module in root.named_modules():
        part = weights.part_of(path)
        if part is not None and part == path:
            watch(module, weights.parts[part].base, path + ".")
        elif part is None and any(absent(weight) for weight in module._parameters.values() if weight is not None):
            watch(module, module, path + ".")
    try:
        yield weights.adapted
    finally:
        for handle in handles:
            handle.remove()
