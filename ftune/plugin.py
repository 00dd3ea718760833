"""What a method is: five kinds of plugin, the facts each declares, and how they are found.

A plugin is a module whose name is the name in the recipe: `ftune/optimizers/sgd.py` is `optim: sgd`. Its module-level
`plugin` object declares facts, which the rules, the planner and the trainer read; none of them knows a method by name.
"""

from __future__ import annotations

import enum
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftune.options import Options

if TYPE_CHECKING:
    import torch

OPTIMIZERS, TUNINGS, OBJECTIVES, FORMATS, EXPORTS = "optimizers", "tuning", "objectives", "formats", "exports"


class Gradients(enum.Enum):
    """When an optimizer consumes gradients; accumulation, clipping and sharding follow from it."""

    KEPT = "kept until step(): may be accumulated and clipped"
    FUSED = "consumed inside backward(): never all alive"
    NONE = "never made: forward passes only"


class Plugin(ABC):
    """What every method says of itself."""

    name: ClassVar[str]
    """The module's own name, and what a recipe calls it."""
    summary: ClassVar[str]
    """One line for `ftune explain`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Import names of packages without which it cannot run."""
    Options: ClassVar[type[Options]] = Options


StateBytes = Callable[[Any, int], float]
"""The bytes of optimizer state of one weight, of which something with so many bytes an element is moved."""


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
    calibrates: ClassVar[bool] = False
    """Whether it chooses the weights that move by the gradients of a few batches before the first step."""
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

    @abstractmethod
    def build(
        self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting
    ) -> torch.optim.Optimizer:
        """Return the optimizer over parameter groups that already carry their `weight_decay`."""


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

    rotates: ClassVar[bool] = False
    """Whether only some of the weights move at a time, in turn: `rotating` then makes the optimizer do so."""

    def prepare(
        self,
        model: Any,
        options: Any,
        *,
        directory: Path,
        batches: Callable[[int], Iterable[dict[str, Any]]],
        say: Callable[[str], None],
    ) -> Any:
        """Return the loaded model as it is trained upon, before `apply`.

        What is made of it is kept in the run `directory`, for a resumed run and other ranks to have the same;
        `batches(rows)` yields so many training rows, one by one, for one that looks at data.
        """
        return model

    @abstractmethod
    def apply(self, model: Any, options: Any, *, batches: Iterable[dict[str, Any]] = ()) -> Any:
        """Return the model with exactly the declared weights trainable; `batches` are those it calibrates on."""

    def calibration_batches(self, options: Any) -> int:
        """Return how many batches of training rows `apply` wants to look at."""
        return 0

    def quantization(self, options: Any) -> Mapping[str, Any] | None:
        """Return how the base is loaded in fewer bits: arguments of BitsAndBytesConfig; None loads it as it is."""
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


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str
    trained: bool = True
    """Whether an assistant turn counts in the loss (a row's own `train: false` or `weight: 0` says no)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of the message (tool calls, names), handed to the chat template as they are."""

    def as_message(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class PlainText:
    """A prompt that is continued as it stands, without a chat template: what plain rows were trained as."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """A row for supervised learning: what to say (trained) after what was said (not trained).

    Either `turns`, rendered with the chat template, or plain `prompt` + `completion` text without one.
    """

    turns: tuple[Turn, ...] = ()
    prompt: str = ""
    completion: str = ""
    tools: tuple[Any, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else the row says and an objective may ask for: a label, or what a reward function compares with."""


class RowError(ValueError):
    """A row is not what its format says; the caller adds the file and the row number."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


@dataclass(frozen=True)
class Finding:
    """One kind of thing that the audit finds in rows."""

    kind: str
    what: str
    """Said of the rows it was found in, after their number: "rows hold no learned token"."""
    why: str
    fix: str
    severity: Literal["fatal", "warning", "note"] = "warning"
    """`fatal` stops the run."""


class Format(Plugin):
    """How rows on disk are read."""

    columns: ClassVar[str]
    """What a row looks like, for messages and documentation."""
    views: ClassVar[tuple[str, ...]] = ("",)
    """The texts made of a row, by name: a preference row is two. An unnamed one is the row itself."""
    teaches: ClassVar[bool] = True
    """Whether its rows hold something to learn; prompts alone do not."""
    findings: ClassVar[tuple[Finding, ...]] = ()
    """What can be wrong with rows of this format alone."""
    loss_setting: ClassVar[str] = "assistant_only_loss"
    """Which key of `data` says whether only answers are learned."""
    trains_whole_text: ClassVar[bool] = False
    """Plain text: every token counts in the loss."""
    templated: ClassVar[bool | None] = True
    """Whether the chat template writes its rows; None where each row says."""

    @abstractmethod
    def detect(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row has this format's columns."""

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Conversation:
        """Return the row as a conversation (its first view); raise RowError with what is wrong."""

    def read_views(self, row: Mapping[str, Any]) -> tuple[Conversation, ...]:
        """Return one conversation for each of `views`; raise RowError with what is wrong."""
        return (self.read(row),)

    def remarks(self, views: tuple[Conversation, ...]) -> Iterable[str]:
        """Yield the kind of each of `findings` that holds for a row."""
        return ()


class Objective(Plugin):
    """What is minimised."""

    formats: ClassVar[frozenset[str]]
    """Names of the data formats it can learn from."""

    @abstractmethod
    def loss(
        self,
        model: Any,
        batch: dict[str, Any],
        *,
        num_items: Any,
        label_smoothing: float,
        options: Any,
        by_source: Any = None,
    ) -> Any:
        """Return the loss summed over trained tokens, divided by `num_items`.

        `by_source` (sources, 2) gathers each source's summed loss and trained tokens, for the metrics.
        """


@dataclass(frozen=True)
class Tolerance:
    """How far an export may be from what it was made of."""

    measure: Literal["largest logit difference", "mean KL"]
    limit: float
    """Of the difference of a logit, or of the mean Kullback-Leibler divergence in nats."""

    def holds(self, difference: float, divergence: float) -> bool:
        """Return whether both are numbers and the measured one is within the limit."""
        found = difference if self.measure == "largest logit difference" else divergence
        return found <= self.limit and math.isfinite(difference + divergence)

    def __str__(self) -> str:
        return f"{self.limit:g} in {self.measure}"


class Export(Plugin):
    """Files that other tools load, made of what a run ended with.

    `source` is a `ftune.weights.source.Source`: whole weights tensor by tensor (`source.weights`), or the files.
    """

    folds: ClassVar[bool] = True
    """Whether it holds whole weights, so that an adapter is folded into its base."""
    read_by: ClassVar[str]
    """What reads the result: "plain transformers"."""
    tolerances: ClassVar[Mapping[str, Tolerance]]
    """Each type that weights can be stored in, by the name that `--dtype` takes, and how far it may be off."""
    refuses: ClassVar[str] = ""
    """What cannot be written so, for the documentation."""

    def default_dtype(self, source: Any) -> str:
        """Return what weights are stored in where nothing is said."""
        return str(source.stored_dtype)

    def bytes_needed(self, source: Any, dtype: str) -> int:
        """Return about how many bytes will be written."""
        bits = {"float32": 32, "bfloat16": 16, "float16": 16, "q8_0": 8.5}
        return int(source.parameters * bits[dtype] / 8)

    def check(self, source: Any) -> None:
        """Raise RecipeError for a source that cannot be written so, before anything is loaded."""

    @abstractmethod
    def write(self, source: Any, folder: Path, *, dtype: str, max_shard_size: str) -> None:
        """Write the files into an empty folder."""

    @abstractmethod
    def computing(self, source: Any, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
        """Return a context with the model as its files say, in float32, and in which way it computes."""


def _modules(package: str) -> Iterable[str]:
    root = importlib.import_module(f"ftune.{package}")
    return sorted(found.name for found in pkgutil.iter_modules(root.__path__) if not found.name.startswith("_"))


@cache
def names(package: str) -> tuple[str, ...]:
    """Return the names of all plugins of one kind, without importing them."""
    return tuple(_modules(package))


@cache
def get(package: str, name: str) -> Any:
    """Return one plugin; KeyError where there is none of that name."""
    if name not in names(package):
        raise KeyError(name)
    return importlib.import_module(f"ftune.{package}.{name}").plugin


def optimizer(name: str) -> Optimizer:
    return get(OPTIMIZERS, name)  # type: ignore[no-any-return]


def tuning(name: str) -> Tuning:
    return get(TUNINGS, name)  # type: ignore[no-any-return]


def objective(name: str) -> Objective:
    return get(OBJECTIVES, name)  # type: ignore[no-any-return]


def customary_learning_rate(optimizer: Optimizer, tuning: Tuning) -> tuple[float, str]:
    """Return the learning rate that `auto` stands for, and why."""
    if tuning.default_learning_rate is None:
        return optimizer.default_learning_rate, optimizer.learning_rate_reason
    if tuning.has_adapter and optimizer.default_adapter_learning_rate is not None:
        return optimizer.default_adapter_learning_rate, optimizer.adapter_learning_rate_reason
    factor = optimizer.default_learning_rate / Optimizer.default_learning_rate
    rate, why = tuning.default_learning_rate * factor, tuning.learning_rate_reason
    return (rate, why) if factor == 1 else (rate, f"{why}, times {factor:g}: {optimizer.learning_rate_reason}")


def export(name: str) -> Export:
    return get(EXPORTS, name)  # type: ignore[no-any-return]


def format_named(name: str) -> Format:
    return get(FORMATS, name)  # type: ignore[no-any-return]
