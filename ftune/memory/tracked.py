"""Every storage that is made and freed while some code runs, over fake tensors or over real ones.

What operators make inside their own kernels is not seen, but for those kernels that are written in Python.
"""

from __future__ import annotations

import bisect
import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ftune.memory.events import Event, Owner, Trace
from ftune.memory.promoted import copied_bytes
from ftune.memory.work import Works

START, FORWARD, BACKWARD, OPTIMIZER, EVALUATION = "start", "forward", "backward", "optimizer", "evaluation"

IN_PYTHON = (
    "bitsandbytes::gemm_4bit",
    "bitsandbytes::int8_mixed_scaled_mm",
    "bitsandbytes::int8_scaled_mm",
    "bitsandbytes::optimizer_update_32bit",
    "bitsandbytes::optimizer_update_8bit_blockwise",
)
"""Operators whose kernel for a CPU is itself made of operators."""
IN_PYTHON_ON_CUDA = ("bitsandbytes::gemm_4bit",)
"""On a GPU the others are one kernel; and so is this one for up to some hundred tokens, which a batch has more of."""


_NO_WORK = ("prim", "profiler")
"""Operators that only ask or say something."""


@dataclass(slots=True)
class _Held:
    """A storage, alive or not."""

    number: int
    size_bytes: int
    owner: Owner
    phase: str
    module: str
    operation: str
    settled: bool = False
    """Whether somebody said what it is for, rather than the circumstances in which it was made."""
    on_host: bool = False


class Tracked(TorchDispatchMode):
    """Notes storages as operators take or make them, until they are freed.

    Who owns one is often known only later (a gradient is one once it lies in `.grad`), so that events are written out
    at the end. It looks into `kernels`, which are written in Python. On a processor the state of chance, which
    checkpointing keeps, lies where everything else does, and operands of unlike dtypes are copied.
    """

    def __init__(self, *, kernels: tuple[str, ...] = IN_PYTHON, on_processor: bool = True) -> None:
        super().__init__()
        self._on_processor = on_processor
        self._hosting = False
        self._phase, self._after_backward = START, False
        self.live_bytes = self.most_bytes = self.most_host_bytes = 0
        self.works = Works()
        self._opened = _keys_of(kernels)
        self._held: dict[int, _Held] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._log: list[tuple[_Held, int, str, str]] = []
        self._count = 0
        self._stopped = False
        self._vocabulary = 0
        self._names: dict[int, str] = {}
        self._running: list[str] = []
        self._forward_nodes: tuple[list[int], list[str]] = ([], [])
        self._undo: list[Callable[[], None]] = []
        self._depth = 0

    # What is run

    def follow(self, model: torch.nn.Module) -> None:
        """Take a model's tensors as weights and buffers, and say from now on which of its modules runs."""
        self._names = {id(module): name for name, module in model.named_modules()}
        output = getattr(model, "get_output_embeddings", lambda: None)()
        self._vocabulary = getattr(output, "out_features", 0) or 0
        for weight in model.parameters():
            self.own(Owner.WEIGHT, tensors_in(weight))
            if weight.requires_grad:
                self._undo.append(weight.register_post_accumulate_grad_hook(self._take_gradient).remove)
        self.own(Owner.BUFFER, model.buffers())
        if not self._running:
            modules = torch.nn.modules.module
            self._undo += [
                modules.register_module_forward_pre_hook(self._enter).remove,
                modules.register_module_forward_hook(self._leave, always_call=True).remove,
            ]

    def unfollow(self) -> None:
        """Take the hooks away."""
        while self._undo:
            self._undo.pop()()

    def own(self, owner: Owner, tensors: Iterable[torch.Tensor]) -> None:
        """Say what tensors are for, whatever they were taken for before."""
        for tensor in tensors:
            for inner in _inner(tensor):
                held = self._note(inner, "")
                if held is not None:
                    held.owner, held.settled = owner, True

    def own_survivors(self) -> None:
        """Take what is alive between two steps, and nobody's yet, for state of the optimizer that made it."""
        for held in self._held.values():
            if not held.settled and held.phase in (OPTIMIZER, BACKWARD):
                held.owner, held.settled = Owner.OPTIMIZER, True
            elif not held.settled and held.phase == START:
                held.owner, held.settled = Owner.BUFFER, True

    @contextlib.contextmanager
    def hosting(self) -> Iterator[None]:
        """Take what is made meanwhile for memory of the host, which is counted apart."""
        before, self._hosting = self._hosting, True
        try:
            yield
        finally:
            self._hosting = before

    @property
    def host_bytes(self) -> int:
        """What lies in the host's memory now."""
        return sum(held.size_bytes for held in self._held.values() if held.on_host)

    def restart(self, phase: str) -> None:
        """Forget what has happened; what is alive now is there from the start."""
        self._log = [(held, held.size_bytes, START, "") for held in self._held.values() if not held.on_host]
        self.works = Works()
        self.most_bytes, self.most_host_bytes = self.live_bytes, self.host_bytes
        self.enter(phase)

    def enter(self, phase: str) -> None:
        """Say what comes now."""
        self._phase, self._after_backward = phase, False

    def stop(self) -> None:
        """Note nothing more."""
        self._stopped = True

    def trace(self) -> Trace:
        """Return what has happened since the restart."""
        events = tuple(
            Event(
                held.number,
                size,
                held.owner,
                phase,
                module,
                "" if phase == START else held.operation,
            )
            for held, size, phase, module in self._log
        )
        return Trace(events, self.works.listed(), self.most_host_bytes)

    # What happens

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if operation.namespace in _NO_WORK:
            return operation(*arguments, **named)
        if operation in self._opened:
            with self:
                return operation._op_dk(self._opened[operation], *arguments, **named)
        name = operation.name()
        read = [*_tensors(arguments), *_tensors(named.values())]
        for tensor in read:
            self._see(tensor, "")
        with self._copied(name, copied_bytes(operation, arguments) if self._on_processor else []):
            made = operation(*arguments, **named)
            written = list(_tensors((made,)))
            for tensor in written:
                self._see(tensor, name)
        self.works.add(self._now, operation, arguments, named, read, made, written)
        return made

    @contextlib.contextmanager
    def _copied(self, operation: str, sizes: list[int]) -> Iterator[None]:
        """Note what a kernel makes before its result and frees after it."""
        copies = []
        for size in sizes:
            self._count += 1
            copies.append(_Held(self._count, size, Owner.TEMPORARY, self._now, self._module, operation))
            self._grow(copies[-1], size)
        yield
        for copy in copies:
            self._grow(copy, -copy.size_bytes)

    @property
    def _now(self) -> str:
        if torch._C._current_graph_task_id() != -1:
            self._after_backward = True
            return BACKWARD
        # What comes between backward and the next forward prepares the step: norms, clipping.
        return OPTIMIZER if self._after_backward and self._phase == FORWARD else self._phase

    @property
    def _module(self) -> str:
        """The module whose forward runs, or whose forward made the node that autograd runs."""
        if self._running:
            return self._running[-1]
        node = torch._C._current_autograd_node() if torch._C._current_graph_task_id() != -1 else None
        if node is None:
            return ""
        numbers, names = self._forward_nodes
        at = bisect.bisect_right(numbers, node._sequence_nr()) - 1
        return names[at] if 0 <= at < len(names) - 1 else ""

    def _see(self, tensor: torch.Tensor, operation: str) -> None:
        for inner in _inner(tensor):
            self._note(inner, operation)

    def _note(self, tensor: torch.Tensor, operation: str) -> _Held | None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a sparse or opaque tensor has none
            return None
        key, size = storage._cdata, storage.nbytes()
        held = self._held.get(key)
        if held is not None:
            if held.size_bytes != size:
                self._resized(held, size)
            return held
        if size == 0:
            return None
        phase, module = self._now, self._module
        self._count += 1
        held = _Held(self._count, size, self._owner(tensor, phase), phase, module, operation)
        held.on_host = self._hosting
        self._held[key] = held
        self._references[key] = weakref.ref(storage, lambda _, key=key: self._freed(key))
        self._grow(held, size)
        return held

    def _owner(self, tensor: torch.Tensor, phase: str) -> Owner:
        if self._vocabulary and tensor.dim() >= 2 and tensor.shape[-1] == self._vocabulary:
            return Owner.LOGITS
        if phase in (FORWARD, BACKWARD) and self._running and torch.is_grad_enabled():
            return Owner.ACTIVATION  # in backward: made again, by checkpointing
        return Owner.ACTIVATION if phase == FORWARD else Owner.TEMPORARY

    def _resized(self, held: _Held, size: int) -> None:
        self._grow(held, size - held.size_bytes)
        held.size_bytes = size

    def _grow(self, held: _Held, size: int) -> None:
        if held.on_host:
            self.most_host_bytes = max(self.most_host_bytes, self.host_bytes)
        if self._stopped or held.on_host:
            return
        self._log.append((held, size, self._now, self._module))
        self.live_bytes += size
        self.most_bytes = max(self.most_bytes, self.live_bytes)

    def _freed(self, key: int) -> None:
        held = self._held.pop(key, None)
        self._references.pop(key, None)
        if held is not None:
            self._grow(held, -held.size_bytes)

    def _take_gradient(self, weight: torch.Tensor) -> None:
        if weight.grad is not None:
            self.own(Owner.GRADIENT, [weight.grad])

    def _enter(self, module: torch.nn.Module, *_: Any) -> None:
        if not self._running and torch._C._current_graph_task_id() == -1:
            self._after_backward = False
        self._running.append(self._names.get(id(module), self._running[-1] if self._running else ""))
        self._note_nodes()

    def _leave(self, *_: Any) -> None:
        self._running.pop()
        self._note_nodes()

    def _note_nodes(self) -> None:
        """From this number on, nodes of the graph are made by the module that runs now."""
        if torch._C._current_graph_task_id() == -1:
            numbers, names = self._forward_nodes
            numbers.append(torch.autograd._get_sequence_nr())
            names.append(self._running[-1] if self._running else "")

    # Storages that no operator makes or changes

    def __enter__(self) -> Any:
        self._depth += 1
        if self._depth == 1:
            self._outside = torch.UntypedStorage.resize_, torch.get_rng_state
            resize, random_state = self._outside
            tracked = self

            def resized(storage: torch.UntypedStorage, size: int) -> Any:
                result = resize(storage, size)
                held = tracked._held.get(storage._cdata)
                if held is not None and held.size_bytes != size:
                    tracked._resized(held, size)
                return result

            def state() -> torch.Tensor:
                # What checkpointing keeps of a CPU's chance, 5 kB a layer.
                found = random_state()
                if tracked._on_processor:
                    tracked._see(found, "get_rng_state")
                return found

            torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
            torch.get_rng_state = state
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._depth -= 1
        if self._depth == 0:
            torch.UntypedStorage.resize_, torch.get_rng_state = self._outside  # type: ignore[method-assign]


def tensors_in(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a weight and the tensors that hang on it: scales and tables of a quantised one."""
    yield weight
    for value in vars(weight).values():
        yield from _held_by(value)


def _held_by(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value).__name__ == "QuantState":
        for inner in vars(value).values():
            yield from _held_by(inner)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operator's arguments or results, which may be lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that a wrapper (DTensor, a quantised tensor) is made of; of any other, itself."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            if isinstance(inner := getattr(tensor, name), torch.Tensor):  # and not the ranks that share it
                yield from _inner(inner)
    else:
        yield tensor


def _keys_of(operations: tuple[str, ...]) -> dict[Any, Any]:
    """Return those of the operators that are installed, and the key under which each has its kernel."""
    found = {}
    for name in operations:
        namespace, _, operation = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operation, None)
        if packet is not None:
            here = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
            keys = torch._C.DispatchKey
            found[packet.default] = keys.CPU if here else keys.CompositeExplicitAutograd
    return found
