"""What an optimizer moves in place of a model's weights: this rank's rows of them, or their copies on the host."""

from __future__ import annotations

import torch
from torch import distributed

from ftune.fused.kept import local
from ftune.sharding.model import is_split, start_of


class Moved:
    """Ordinary tensors in place of weights of which a rank moves some rows.

    They share the memory of split weights, or of whole ones of which ranks share the work (ZeRO's stage 1). On the host
    they are copies, and so is the optimizer's state: gradients go there for each step, and moved rows come back
    (ZeRO-Offload, Ren et al., 2021).
    """

    def __init__(self, *, rank: int = 0, ranks: int = 1, on_host: bool = False) -> None:
        """`ranks` share the work on weights that are whole."""
        self._rank, self._ranks, self._on_host = rank, ranks, on_host
        self._pairs: list[tuple[torch.Tensor, torch.nn.Parameter]] = []

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what stands for a weight, which says whose it is; the weight itself where nothing has to."""
        if not is_split(weight) and self._ranks == 1 and not self._on_host:
            return weight
        own = self._own(weight.detach())
        rows = torch.nn.Parameter(_to_host(own) if self._on_host else own)
        rows.copy_of = weight  # type: ignore[attr-defined]
        self._pairs.append((weight, rows))
        return rows

    def take_gradients(self) -> None:
        """Give the rows the gradients that backward left at the weights."""
        for weight, rows in self._pairs:
            grad = None if weight.grad is None else self._own(weight.grad)
            if self._on_host:
                rows.grad = None if grad is None else grad.cpu()
                continue
            # Once, before its first forward, FSDP may put a weight's rows elsewhere.
            rows.data, rows.grad = self._own(weight.detach()), grad

    def moved(self) -> None:
        """Let go of the gradients, and bring moved rows to where they are wanted: the device, and other ranks."""
        for weight, rows in self._pairs:
            rows.grad = None
            if self._on_host:
                self._own(weight.detach()).copy_(rows.detach(), non_blocking=True)
            if not is_split(weight) and self._ranks > 1:
                _gather_rows(weight.detach(), self._rank, self._ranks)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        if is_split(tensor):
            return local(tensor)
        first, end = (start_of(len(tensor), rank, self._ranks) for rank in (self._rank, self._rank + 1))
        return tensor[first:end] if self._ranks > 1 else tensor


def _to_host(rows: torch.Tensor) -> torch.Tensor:
    """Return a copy on the host, in memory that a GPU can read while it computes."""
    copied = rows.to("cpu", copy=True)
    return copied.pin_memory() if rows.device.type == "cuda" else copied


def _gather_rows(weight: torch.Tensor, rank: int, ranks: int) -> None:
    """Fill a whole weight with the rows of each rank."""
    starts = [start_of(len(weight), each, ranks) for each in range(ranks + 1)]
    if len(weight) % ranks == 0 and weight.is_contiguous():
        distributed.all_gather_into_tensor(weight, weight[starts[rank] : starts[rank + 1]].clone())
        return
    for each in range(ranks):
        if starts[each] < starts[each + 1]:
            distributed.broadcast(weight[starts[each] : starts[each + 1]], src=each)
