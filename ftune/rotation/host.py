"""Tensors of a device put away in pinned host memory, and brought back.

On a CPU nothing is moved. Copies are queued on the device's stream, in order with what computes there, so that nobody
waits; whoever reads the host's copies has to `settle` first. Pinning is slow: memory once pinned is kept.
"""

from __future__ import annotations

from typing import Any

import torch

Path = tuple[Any, ...]


class HostMemory:
    """The host's side of some tensors of one kind of device, each known by a path."""

    def __init__(self, device_type: str = "cuda") -> None:
        self._device_type = device_type
        self._kept: dict[Path, torch.Tensor] = {}
        self._devices: dict[Path, torch.device] = {}

    def put_away(self, value: Any, path: Path) -> Any:
        """Return a value with the device tensors in it moved to the host."""
        if isinstance(value, torch.Tensor):
            return self._put_away(value, path)
        return _each(value, path, self.put_away)

    def bring_back(self, value: Any, path: Path) -> Any:
        """Return a value with the tensors in it where they were before they were put away."""
        if isinstance(value, torch.Tensor):
            return value.to(self._devices[path], non_blocking=True) if path in self._devices else value
        return _each(value, path, self.bring_back)

    def settle(self) -> None:
        """Wait until the copies on the host are whole."""
        for device in set(self._devices.values()):
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def _put_away(self, tensor: torch.Tensor, path: Path) -> torch.Tensor:
        # Paged tensors (bitsandbytes) move by themselves.
        if tensor.device.type != self._device_type or getattr(tensor, "is_paged", False):
            return tensor
        kept = self._kept.get(path)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._kept[path] = kept
        self._devices[path] = tensor.device
        return kept.copy_(tensor, non_blocking=True)


def _each(value: Any, path: Path, move: Any) -> Any:
    if isinstance(value, dict):
        return {key: move(inner, (*path, key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(move(inner, (*path, number)) for number, inner in enumerate(value))
    return value
