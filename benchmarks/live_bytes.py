"""The most bytes of tensors alive at once: weights, gradients, state and activations, whatever the allocator holds."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations take or make, until they are freed; `most` is the peak since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        self.most = self.now

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        made = operation(*arguments, **(named or {}))
        for value in (*tree_flatten((arguments, named))[0], *tree_flatten(made)[0]):
            if isinstance(value, torch.Tensor):
                self._seen(value.untyped_storage())
        return made

    def _seen(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
