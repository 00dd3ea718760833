"""One rank of several, without the others: what is sent goes nowhere, and everything that a rank holds is there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from ftune.memory.events import Owner
from ftune.memory.tracked import Tracked


def become_one_of(ranks: int) -> None:
    """Make this process the first of so many ranks, whose collectives do nothing; it is then fit for nothing else."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())


@contextlib.contextmanager
def replicated(tracked: Tracked) -> Iterator[None]:
    """Let DistributedDataParallel be its buckets: what it holds beside a model; its own code reads addresses."""
    before = torch.nn.parallel.DistributedDataParallel

    class Replica(torch.nn.Module):
        """A model, and a copy of every gradient in buckets."""

        def __init__(self, module: torch.nn.Module, *_: Any, **__: Any) -> None:
            super().__init__()
            self.module = module
            trained = [weight for weight in module.parameters() if weight.requires_grad]
            self._buckets = [torch.empty_like(weight, requires_grad=False) for weight in trained]
            tracked.own(Owner.BUFFER, self._buckets)

        def forward(self, *arguments: Any, **named: Any) -> Any:
            return self.module(*arguments, **named)

        @contextlib.contextmanager
        def no_sync(self) -> Iterator[None]:
            yield

    torch.nn.parallel.DistributedDataParallel = Replica  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.nn.parallel.DistributedDataParallel = before  # type: ignore[misc]
