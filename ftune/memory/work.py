"""What operators compute and move."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from ftune.memory.events import Work


class Works:
    """Sums by phase, operator and dtype."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str], list[int]] = {}

    def add(
        self,
        phase: str,
        operation: Any,
        arguments: Any,
        named: Any,
        read: list[torch.Tensor],
        made: Any,
        written: list[torch.Tensor],
    ) -> None:
        """Count one operator; views and memory without contents start nothing on a device."""
        if _is_view(operation) or "empty" in operation.name():
            return
        dtype = next((value.dtype for value in (*read, *written) if value.is_floating_point()), torch.int64)
        counted = flop_registry.get(operation._overloadpacket)
        flops = int(counted(*arguments, **named, out_val=made)) if counted is not None else 0
        moved = sum(value.numel() * value.element_size() for value in (*read, *written))
        sums = self._sums.setdefault((phase, operation.name(), str(dtype).removeprefix("torch.")), [0, 0, 0])
        sums[0] += 1
        sums[1] += flops
        sums[2] += moved

    def listed(self) -> tuple[Work, ...]:
        return tuple(Work(*key, *sums) for key, sums in self._sums.items())


_VIEWS: dict[Any, bool] = {}


def _is_view(operation: Any) -> bool:
    if operation not in _VIEWS:
        returns = operation._schema.returns
        infos = [value.alias_info for value in returns]
        _VIEWS[operation] = bool(infos) and all(info is not None and not info.is_write for info in infos)
    return _VIEWS[operation]
