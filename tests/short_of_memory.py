"""A device that is short of memory, for tests: as a GPU says it, or as this process's own limit does.

python short_of_memory.py LIMITS train RECIPE     runs ftune under limits given as JSON
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def room_for(
    rows: int, *, after: int = 0, inside: str = "forward", until: int = 10**9, kill_at: int = 0
) -> Iterator[list[int]]:
    """Raise torch.OutOfMemoryError, as a GPU does, in the second layer of a Llama that trains more rows at once.

    `after` so many forward passes have gone well, and not after `until`; `inside` forward or backward. At pass
    `kill_at` the process is killed. Yields the rows of each pass.
    """
    import torch

    passes: list[int] = []

    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def hook(module: Any, arguments: Any) -> None:
        name = type(module).__name__
        if not (module.training and torch.is_grad_enabled()):
            return
        if name == "Embedding":
            passes.append(len(arguments[0]))
            if len(passes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        # The embedding tells the passes, the second layer's MLP is where memory ends.
        if name == "LlamaMLP" and module is not first[0] and passes[-1] > rows and after < len(passes) <= until:
            if inside == "forward":
                short()
            arguments[0].register_hook(short)
        if name == "LlamaMLP" and first[0] is None:
            first[0] = module

    first: list[Any] = [None]
    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield passes
    finally:
        handle.remove()


@contextlib.contextmanager
def real_limit(megabytes: int) -> Iterator[None]:
    """Give this process no more memory than so much beyond what it holds at its first training pass."""
    import resource

    import torch

    def hook(module: Any, arguments: Any) -> None:
        if module.training and torch.is_grad_enabled() and type(module).__name__ == "Embedding":
            held = next(
                line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")
            )
            limit = int(held.split()[1]) * 1024 + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
            handle.remove()

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> None:
    """Train or resume under one of the limits, as `ftune` does."""
    import json

    from ftune.cli import main as command

    limits = json.loads(sys.argv[1])
    only = limits.pop("rank", None)
    sys.argv = ["ftune", *sys.argv[2:]]
    short = real_limit(**limits) if "megabytes" in limits else room_for(**limits)
    with short if only in (None, os.environ.get("RANK")) else contextlib.nullcontext():
        command()


if __name__ == "__main__":
    main()
