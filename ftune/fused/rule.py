"""How one tensor moves, given its gradient: what an update inside backward and one over kept gradients share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from ftune.fused.rounding import Rounding

SLICE = 1 << 20
"""Elements computed in float32 at once where weights have fewer bits: 4 MB for each operand."""


class Rule(ABC):
    """How one tensor moves."""

    @abstractmethod
    def fresh(self, weight: torch.Tensor) -> dict[str, Any]:
        """Return the state of a weight that was never moved: tensors and numbers, which a checkpoint keeps."""

    @abstractmethod
    def update(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rounding: Rounding,
        shape: torch.Size,
    ) -> None:
        """Move a weight by its gradient, which may be overwritten; `group` has `lr` and `weight_decay`.

        `shape` is that of the whole tensor, of which several ranks may each have some of the first dimension.
        """


def slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the elements of tensors of one shape, side by side and at most `SLICE` at a time, as views.

    A tensor that cannot be seen flat is yielded whole, with the others: its arithmetic then takes 4 bytes an element.
    """
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, max(1, flat[0].numel()), SLICE):
        yield tuple(tensor[start : start + SLICE] for tensor in flat)


def row_slices(weight: torch.Tensor) -> Iterator[slice]:
    """Yield stretches of a tensor's first dimension of about `SLICE` elements each."""
    rows = max(1, SLICE // max(1, weight.shape[1:].numel()))
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)
