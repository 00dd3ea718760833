"""GPTQ through a whole model: each layer is fitted to the inputs that it gets from the layers already quantised.

Within a block of the model, layers that read the same tensor (query, key and value) are fitted together, then the next
ones on what the block now makes ("true sequential"). Alive are the hidden states of all batches at one block and one
block's H, never more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ftune.quantized.gptq import InputHessian, fit_gptq
from ftune.quantized.linear import QuantizedLinear


@dataclass
class _Call:
    """How a block is called for one batch: its hidden states, and whatever else the model hands to it."""

    hidden: torch.Tensor
    more: tuple[Any, ...]
    named: list[dict[str, Any]]
    """One for each block: masks may differ between them."""


def quantise_sequentially(
    model: Any,
    blocks: Sequence[nn.Module],
    names: Iterable[str],
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    bits: int,
    group_size: int,
    say: Callable[[str], None],
) -> None:
    """Put codes in the place of the named linear layers, block by block from the bottom up.

    Layers outside the blocks, and layers that no batch reached (experts never chosen), are rounded to nearest.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        calls = [_record(model, blocks, batch) for batch in batches]
        wanted = set(names)
        for number, block in enumerate(blocks):
            inside = {id(module): name for name, module in block.named_modules()}
            whole = {name: inside[id(module)] for name, module in model.named_modules() if id(module) in inside}
            own = [inner for name, inner in whole.items() if name in wanted]
            say(f"GPTQ: layer {number + 1} of {len(blocks)}")
            _quantise_block(block, number, own, calls, bits, group_size)
            wanted -= {name for name, inner in whole.items() if inner in own}
            for call in calls:
                call.hidden = _run(block, call, number)
        for name in sorted(wanted):
            dense = model.get_submodule(name)
            _replace(model, name, InputHessian(dense.in_features, dense.weight.device), bits, group_size)
    model.train(was_training)


def _quantise_block(
    block: nn.Module, number: int, names: list[str], calls: list[_Call], bits: int, group_size: int
) -> None:
    remaining = set(names)
    while remaining:
        # Layers that read one tensor have one H; one that no batch reached stands alone.
        together = _reading_first(block, number, remaining, calls) or [min(remaining)]
        first = block.get_submodule(together[0])
        seen = InputHessian(first.in_features, first.weight.device)
        with _watching(block, together[:1], lambda _, x, seen=seen: seen.add(x)):
            for call in calls:
                _run(block, call, number)
        for name in together:
            _replace(block, name, seen, bits, group_size)
        remaining -= set(together)


def _reading_first(block: nn.Module, number: int, names: set[str], calls: list[_Call]) -> list[str]:
    """Return the first layer to be called, and those that read the very tensor that it reads."""
    order: list[tuple[str, torch.Tensor]] = []
    for call in calls:
        with _watching(block, names, lambda name, x: order.append((name, x))):
            _run(block, call, number)
        if order:
            break
    return list(dict.fromkeys(name for name, x in order if x is order[0][1]))


def _replace(root: nn.Module, name: str, seen: InputHessian, bits: int, group_size: int) -> None:
    dense = root.get_submodule(name)
    codes = fit_gptq(dense.weight, bits, group_size, hessian=seen.mean())
    root.set_submodule(name, QuantizedLinear(codes, dense.bias))


class _Reached(Exception):  # noqa: N818  (a way out of a forward pass, not an error)
    """The last block has been called."""


def _record(model: Any, blocks: Sequence[nn.Module], batch: dict[str, torch.Tensor]) -> _Call:
    """Run the model as far as its last block and note how each block is called."""
    hidden: list[torch.Tensor] = []
    more: list[tuple[Any, ...]] = []
    named: list[dict[str, Any]] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        first, *rest = args if args else (kwargs.pop("hidden_states"),)
        if not hidden:
            hidden.append(first)
            more.append(tuple(rest))
        named.append(kwargs)
        if block is blocks[-1]:
            raise _Reached

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    try:
        with contextlib.suppress(_Reached):
            model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return _Call(hidden[0], more[0], named)


def _run(block: nn.Module, call: _Call, number: int) -> torch.Tensor:
    made = block(call.hidden, *call.more, **call.named[number])
    return made[0] if isinstance(made, tuple) else made


@contextlib.contextmanager
def _watching(block: nn.Module, names: Iterable[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see` with the name and the input of each named layer that runs."""
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
