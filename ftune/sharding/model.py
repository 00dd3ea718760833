"""Weights, gradients and state split over ranks: ZeRO (Rajbhandari et al., 2020), by PyTorch's FSDP2.

Gradients reach each rank already averaged, as its own rows, and between steps a rank of N holds one N-th of everything.
Stage 3 gathers a layer's weights while it runs, forward and again backward; stage 2 keeps them in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ftune.blocks import blocks_of
from ftune.errors import Problem, RecipeError
from ftune.fused.kept import local


@dataclass(frozen=True)
class Held:
    """How many elements of a model's weights this rank holds, and all ranks together."""

    own: int
    every: int


def split(model: Any, device_type: str, *, stage: int) -> Any:
    """Return a model of which each rank holds its rows; raises RecipeError where it cannot be split.

    Every rank has loaded the same whole weights, of which it keeps its part. `stage` is ZeRO's, 2 or 3.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    scalar = next((name for name, weight in inner.named_parameters() if weight.dim() == 0), None)
    if scalar is not None:
        what = f"`{scalar}` of this model is a single number, which cannot be split over ranks"
        raise RecipeError(Problem("sharding-scalar", what, fix="set distributed.zero_stage: 0"))
    mesh = init_device_mesh(device_type, (distributed.get_world_size(),))
    for block in blocks_of(inner):
        fully_shard(block, mesh=mesh, reshard_after_forward=stage == 3)
    # The innermost model, which `generate` calls without the adapter around it; its own weights are the ends.
    fully_shard(inner, mesh=mesh, reshard_after_forward=stage == 3)
    return model


def let_go(model: Any) -> None:
    """Free the weights that a forward without a backward has gathered: they would be stale once their rows move."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_split(weight: Any) -> bool:
    """Return whether ranks share a weight."""
    return isinstance(weight, DTensor)


def engine_in_use(model: Any, *, reduces_itself: bool) -> str:
    """Return what a prepared model is carried by, as a recipe names it, from what it is made of.

    `reduces_itself`: ftune averages the gradients of whole replicas.
    """
    if all(is_split(weight) for weight in model.parameters()):
        return "fsdp"
    whole_replicas = not any(is_split(weight) for weight in model.parameters())
    replicated = isinstance(model, torch.nn.parallel.DistributedDataParallel) or reduces_itself
    return "ddp" if whole_replicas and replicated else "none"


def held(model: Any) -> Held:
    """Return what this rank holds of a model."""
    weights = list(model.parameters())
    return Held(sum(local(weight).numel() for weight in weights), sum(weight.numel() for weight in weights))


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over the ranks, written into it; every rank gets the same bits."""
    distributed.all_reduce(tensor)
    return tensor


def clip(weights: Iterable[torch.Tensor], most: float) -> torch.Tensor:
    """Scale the gradients of split weights down to a global norm, as `clip_grad_norm_` does; return it as it was.

    With `most` 0 they stay as they are.
    """
    gradients = [local(weight.grad) for weight in weights if weight.grad is not None]
    if not gradients:
        return torch.zeros(())
    squares = torch.stack([torch.linalg.vector_norm(each, dtype=torch.float32).square() for each in gradients])
    norm = add_up(squares).sum().sqrt()
    if most > 0:
        factor = (most / (norm + 1e-6)).clamp_(max=1.0)
        for each in gradients:
            each.mul_(factor)
    return norm


def all_finite(weights: Iterable[torch.Tensor], device: torch.device) -> bool:
    """Return whether no rank has a weight that is not a number."""
    broken = torch.zeros((), device=device)
    for weight in weights:
        broken += (~torch.isfinite(local(weight.detach()))).any()
    return not bool(add_up(broken))


@contextlib.contextmanager
def whole(model: Any, *, only: Iterable[torch.Tensor] | None = None) -> Iterator[bool]:
    """Hold a model's weights whole on the first rank's host, one of them gathered after another, for it to be written.

    Yields whether this is that rank; all have to come. `only` names the weights to gather.
    """
    first = distributed.get_rank() == 0
    wanted = None if only is None else {id(weight) for weight in only}
    before: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    gathered: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None or not is_split(weight) or (wanted is not None and id(weight) not in wanted):
                continue
            if id(weight) not in gathered:  # a tied weight is one, and stays one
                full = weight.detach().full_tensor()
                kept = full.cpu() if first else full.new_empty(0)
                gathered[id(weight)] = torch.nn.Parameter(kept, requires_grad=False)
            before.append((module, name, weight))
    try:
        if first:
            for module, name, weight in before:
                module._parameters[name] = gathered[id(weight)]
        yield first
    finally:
        for module, name, weight in before:
            module._parameters[name] = weight


@torch.no_grad()
def fill(weight: torch.Tensor, values: torch.Tensor) -> None:
    """Write whole values into a weight, or this rank's rows of it."""
    if not is_split(weight):
        weight.copy_(values)
        return
    rows = local(weight)
    first = first_row(weight)
    rows.copy_(values[first : first + len(rows)])


def first_row(weight: torch.Tensor) -> int:
    """Return where this rank's rows of a split weight begin."""
    return start_of(len(weight), distributed.get_rank(), distributed.get_world_size())


def start_of(rows: int, rank: int, ranks: int) -> int:
    """Return where a rank's rows begin: equal parts but for the last ones, as `torch.chunk` cuts."""
    return min(rows, rank * -(-rows // ranks))
