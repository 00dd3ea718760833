"""How weights move: the facts of an optimizer."""

from __future__ import annotations

import enum
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftune.plugin.base import Plugin

if TYPE_CHECKING:
    import torch


class Gradients(enum.Enum):
    """When an optimizer consumes gradients; accumulation, clipping and sharding follow from it."""

    KEPT = "kept until step(): may be accumulated and clipped"
    FUSED = "consumed inside backward(): never all alive"
    NONE = "never made: forward passes only"


class Sharding(enum.Enum):
    """What ranks may do that have only some rows of each weight."""

    ROWS = "each element of a weight moves by its own gradient"
    SUMS = "statistics of rows and columns are added up over them"
    WHOLE = "a step needs the whole of each weight, so none is split"


@dataclass(frozen=True)
class Setting:
    """What an optimizer may need to know of the run that it is built for."""

    model: Any = None
    """The model whose weights it moves, for one that looks at modules and not only at tensors."""
    device_type: str = "cpu"
    seed: int = 0
    max_grad_norm: float = 0.0
    """The global norm above which gradients are scaled down; 0 clips nothing. One that keeps its gradients need not
    look: the trainer clips them."""
    scales_loss: bool = False
    """Whether float16 is computed in, so that the loss is scaled up for small gradients not to vanish."""
    directory: Path | None = None
    """The run directory, for one that keeps a log of its own."""
    add_up: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Returns the sum of a tensor over the ranks, of which each has its rows of every weight; None where none is
    split."""
    rank: int = 0


@dataclass(frozen=True)
class TrainedTensor:
    """What an optimizer's state depends on, of one tensor that it moves."""

    shape: tuple[int, ...]
    element_bytes: int = 4
    """Of what the optimizer moves: the weight itself, or its float32 copy."""
    hidden: bool = True
    """False for embeddings and the output layer."""
    embedding: bool = False
    """Whether it is the weight of an embedding layer, which a tied output layer shares."""
    adapter: bool = False
    """Whether it is of an adapter beside weights that are trained too."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Optimizer(Plugin):
    """How weights move, given gradients.

    One with FUSED gradients builds a `torch.optim.Optimizer` that also has `backward(loss, last)`, called for each
    micro-batch; one with NONE has `learn(loss_of)`, called once for each step with a function that returns the loss of
    all its micro-batches. Both have `grad_norm`, for the metrics. The trainer calls `step()` of each.
    """

    gradients: ClassVar[Gradients] = Gradients.KEPT
    computes: ClassVar[str] = ""
    """What it computes, where others compute the same: those with one word here move float32 weights to the same
    numbers but for rounding, given the same options and the same clipping; empty where there is no other."""
    calibrates: ClassVar[bool] = False
    """Whether it chooses the weights that move by the gradients of a few batches before the first step."""
    sharding: ClassVar[Sharding] = Sharding.WHOLE
    whole_state: ClassVar[frozenset[str]] = frozenset()
    """Names of the state of a matrix that ranks have whole, where each has only some of its rows."""
    state_follows_rows: ClassVar[bool] = True
    """Whether state has the rows of its weight, so that another number of ranks can share it out anew."""
    pages_state: ClassVar[bool] = False
    """Whether large tensors of its state move to the host where a GPU runs short."""
    averages: ClassVar[bool] = False
    """Whether what it evaluates and saves is an average of the steps, which takes the place of a falling rate."""
    state_bytes_per_parameter: ClassVar[float]
    """Bytes of optimizer state per trained element of a large matrix."""
    state_bytes_note: ClassVar[str] = ""
    """What the figure leaves out (factored statistics, small tensors kept in 32 bits)."""
    state_in_weights_dtype: ClassVar[bool] = False
    """Whether its state has the weights' dtype: the figure is that of float32, and of 16 bits it is half."""
    default_learning_rate: ClassVar[float] = 5e-5
    """Used for full fine-tuning where the recipe says `auto`."""
    learning_rate_reason: ClassVar[str] = "Hugging Face's default for AdamW"
    default_adapter_learning_rate: ClassVar[float | None] = None
    """Used for adapters where the recipe says `auto`; None: the tuning's own, as many times as the rate is AdamW's."""
    adapter_learning_rate_reason: ClassVar[str] = ""
    default_max_grad_norm: ClassVar[float] = 1.0
    max_grad_norm_reason: ClassVar[str] = "the customary clip of the global gradient norm"
    device_notes: ClassVar[Mapping[str, str]] = {}
    """What a user should know about it on one kind of device."""

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of state of one trained tensor, but for single numbers such as a count of steps."""
        share = tensor.element_bytes / 4 if self.state_in_weights_dtype else 1.0
        return self.state_bytes_per_parameter * tensor.elements * share

    def clips_itself(self, options: Any) -> bool:
        """Return whether its options limit gradients already, so that the global norm need not."""
        return any(getattr(options, key, None) is not None for key in ("clip_grad_value", "clip_grad_norm_per_tensor"))

    def accumulates(self, options: Any) -> bool:
        """Return whether the gradients of several micro-batches can become one step."""
        return self.gradients is not Gradients.FUSED or getattr(options, "accumulate", None) is not None

    def adds_up(self, options: Any) -> bool:
        """Return whether gradients of micro-batches are added up, so that no micro-batch's graph outlives it."""
        kept = self.gradients is Gradients.KEPT
        return kept or (self.gradients is Gradients.FUSED and getattr(options, "accumulate", None) == "buffer")

    @abstractmethod
    def build(
        self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting
    ) -> torch.optim.Optimizer:
        """Return the optimizer over parameter groups that already carry their `weight_decay`."""
