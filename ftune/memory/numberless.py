"""Running code on tensors without numbers: shapes, dtypes and lifetimes are real, and nothing is computed.

PyTorch's fake tensors do this until the code asks for a number. Each such question is answered here: masks and labels
are known, and a loss is finite.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
_MOST_KNOWN = 1 << 22
"""Tensors of more elements, such as the mask of long rows, are not worth their numbers."""


class Answers(TorchDispatchMode):
    """What fake tensors cannot say: single numbers, and shapes that depend on numbers.

    Of integers and truth values the numbers are kept beside, where operators make them of known ones: what a mask is
    made of, which positions are learned. Of everything else the answer is that all is well.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if operation is _aten._local_scalar_dense.default:
            return self._number(arguments[0])
        if operation is _aten.nonzero.default:
            return self._places(arguments[0])
        if operation is _aten.equal.default:
            return True
        made = operation(*arguments, **named)
        if isinstance(made, FakeTensor):
            self._note(made, operation, arguments, named)
        return made

    def _note(self, made: FakeTensor, operation: Any, arguments: Any, named: Any) -> None:
        """Keep the numbers of a result, where those of all arguments are known."""
        if made.is_floating_point() or made.numel() > _MOST_KNOWN or made.is_complex():
            return
        try:
            arguments, named = tree_map(self._numbers, (arguments, named))
        except KeyError:
            self._known.pop(made, None)
            return
        with _disable_current_modes():
            self._known[made] = operation(*arguments, **named)

    def _numbers(self, value: Any) -> Any:
        return self._known[value] if isinstance(value, FakeTensor) else value

    def _number(self, value: torch.Tensor) -> bool | int | float:
        if value in self._known:
            with _disable_current_modes():
                return self._known[value].item()  # type: ignore[no-any-return]
        return True if value.dtype == torch.bool else 1.0 if value.is_floating_point() else 1

    def _places(self, value: torch.Tensor) -> torch.Tensor:
        if value not in self._known:
            return value.new_empty((value.numel(), value.dim()), dtype=torch.int64)
        with _disable_current_modes():
            found = self._known[value].nonzero()
        made = value.new_empty(found.shape, dtype=torch.int64)
        self._known[made] = found
        return made


@contextlib.contextmanager
def numberless(fake: FakeTensorMode) -> Iterator[None]:
    """Make every tensor that is made within a fake one.

    Changes what libraries do throughout the process: for a process of its own.
    """
    from transformers.utils import import_utils

    asked, applied = import_utils.is_fake_tensor, torch.nn.Module._apply
    # Else transformers takes a trace for an export, and builds masks that a run does without.
    import_utils.is_fake_tensor = lambda *_: False
    torch.nn.Module._apply = _apply  # type: ignore[method-assign, assignment]
    # Lists of tensors are one operator for tensors of these types, and one for each tensor of others.
    modules = [importlib.import_module(name) for name in ("torch.optim.optimizer", "torch.utils._foreach_utils")]
    by_list = [module._foreach_supported_types for module in modules]
    for types in by_list:
        types.append(FakeTensor)
    try:
        with fake, Answers():
            yield
    finally:
        for types in by_list:
            types.remove(FakeTensor)
        import_utils.is_fake_tensor = asked
        torch.nn.Module._apply = applied  # type: ignore[method-assign]


def fake_mode() -> FakeTensorMode:
    """Return what makes tensors fake; those that a library made of numbers before may be used with them."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def as_fake(module: torch.nn.Module, fake: FakeTensorMode) -> None:
    """Put fake tensors in the place of a module's tensors on `meta`; those that are shared stay shared."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    """With the tensor it stands for, whose address is nobody else's as long as it lives."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with fake, torch.no_grad():
                held = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                held = torch.nn.Parameter(held, requires_grad=tensor.requires_grad)
            made[id(tensor)] = held, tensor
        return made[id(tensor)][0]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    held[name] = of(tensor)


def _apply(module: torch.nn.Module, change: Any, recurse: bool = True) -> torch.nn.Module:
    """Module.to and its like, where nothing changes: PyTorch's own would exchange fake parameters for copies."""
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        with torch.no_grad():
            changed = change(tensor)
        if (changed.dtype, changed.device.type) != (tensor.dtype, tensor.device.type):
            raise NotImplementedError("tensors without numbers are neither moved nor cast by their module")
    return module
