"""Which weights move: the facts of a tuning."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ftune.plugin.base import Plugin

if TYPE_CHECKING:
    import torch

StateBytes = Callable[[Any, int], float]
"""The bytes of optimizer state of one weight, of which something with so many bytes an element is moved."""


class Batches(Protocol):
    """Training rows for a tuning that looks at data before the first step: the same ones on every rank."""

    def __call__(self, count: int, *, rows: int | None = None) -> Iterable[dict[str, Any]]:
        """Yield up to `count` batches of so many rows, None being those of a training batch, on the model's device.

        A batch has what the model reads, and `labels` where its rows are of one text.
        """
        ...


def no_batches(count: int, *, rows: int | None = None) -> Iterable[dict[str, Any]]:
    """Yield none: where there are no rows."""
    return ()


class Tuning(Plugin):
    """Which weights move."""

    has_adapter: ClassVar[bool] = False
    """Whether the result is an adapter beside an unchanged base."""
    default_learning_rate: ClassVar[float | None] = None
    """Overrides the optimizer's default where the recipe says `auto`."""
    learning_rate_reason: ClassVar[str] = ""
    frozen_base: ClassVar[bool] = False
    """Frozen weights need no float32 copy: they may be held in the compute dtype."""

    folds: ClassVar[bool] = False
    """Whether an adapter is trained beside weights that are trained too; the result is weights with it folded in."""

    quantises: ClassVar[bool] = False
    """Whether it holds the base in fewer bits than its files do: `quantization` then says how.

    Such a base is whole on every device: what splits weights over devices (ZeRO-3) cannot split it.
    """

    takes_codes: ClassVar[bool] = False
    """Whether it trains upon the codes of a model in few bits that ftune reads itself."""

    split_note: ClassVar[str] = ""
    """Why ranks cannot share out its weights; empty where they can."""
    rotates: ClassVar[bool] = False
    """Whether only some of the weights move at a time, in turn: `rotating` then makes the optimizer do so."""

    def prepare(
        self,
        model: Any,
        options: Any,
        *,
        directory: Path,
        batches: Batches,
        say: Callable[[str], None],
    ) -> Any:
        """Return the loaded model as it is trained upon, before `apply`.

        What is made of it is kept in the run `directory`, for a resumed run and other ranks to have the same.
        """
        return model

    @property
    def splits(self) -> bool:
        """Whether ranks can share out its weights."""
        return not self.split_note

    @abstractmethod
    def apply(self, model: Any, options: Any, *, batches: Batches) -> Any:
        """Return the model with exactly the declared weights trainable."""

    def without_numbers(self, model: Any, options: Any) -> Any:
        """Return a model on `meta`, which has shapes only, as `prepare` and `apply` leave one with weights."""
        return self.apply(model, options, batches=no_batches)

    def quantization(self, options: Any) -> Mapping[str, Any] | None:
        """Return how the base is loaded in fewer bits: arguments of BitsAndBytesConfig; None loads it as it is."""
        return None

    def group_of_inputs(self, options: Any) -> int | None:
        """Return how many inputs of a layer share a scale, where `prepare` quantises the linear layers in groups."""
        return None

    def fits_rounded_base(self, options: Any) -> bool:
        """Return whether the adapter makes up for what quantising took, so that it is wrong on the unquantised base."""
        return False

    def takes_from_base(self, options: Any) -> bool:
        """Return whether the adapter starts with a part of the weights, which is taken out of them."""
        return False

    def learning_rate_of(self, name: str, weight: torch.Tensor, learning_rate: float, options: Any) -> float:
        """Return the peak learning rate of one trained weight."""
        return learning_rate

    def save(self, model: Any, folder: Path, *, directory: Path) -> None:
        """Write the result so that it is right on the base that the recipe names; `directory` is the run's."""
        model.save_pretrained(folder)

    def adapter_weights(self, model: Any) -> list[Any]:
        """Return the weights of an adapter that is trained beside others; an optimizer is told of them by group."""
        return []

    def finished(self, model: Any) -> Any:
        """Return a trained model as it is saved at the end."""
        return model

    def fingerprint(self, model: Any) -> str | None:
        """Return what identifies the weights that `prepare` made; checkpoints hold it, and no others go with them."""
        return None

    def copies_in_float32(self, options: Any) -> bool:
        """Return whether weights of 16 bits move through float32 copies, which lose no small update."""
        return False

    def state_bytes(self, model: Any, trained: Sequence[Any], of: StateBytes, options: Any) -> float:
        """Return the most bytes of optimizer state that are held at a time, and so by a checkpoint."""
        return sum(of(weight, weight.element_size()) for weight in trained)

    def sweep(
        self, model: Any, trained: Sequence[Any], options: Any, *, steps: int, steps_per_epoch: int
    ) -> tuple[int, str]:
        """Return the least steps in which every weight has a turn, and what to set for a run of `steps` to be enough.

        Only asked of one that rotates. The setting is empty where none helps.
        """
        raise NotImplementedError

    def rotating(
        self,
        model: Any,
        groups: list[dict[str, Any]],
        build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        options: Any,
        *,
        seed: int,
        steps_per_epoch: int,
    ) -> torch.optim.Optimizer:
        """Return an optimizer that moves some of the weights at each step, made with `build`.

        It freezes and frees weights itself, and has `steps_per_rate`: so many steps share a learning rate.
        """
        raise NotImplementedError
