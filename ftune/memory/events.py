"""The record of a step: every storage that is made and freed, in order, and what was computed in between."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Owner(str, Enum):
    """What a storage is for."""

    WEIGHT = "weight"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"
    ACTIVATION = "activation"
    LOGITS = "logits"
    BUFFER = "buffer"
    TEMPORARY = "temporary"


@dataclass(frozen=True, slots=True)
class Event:
    """A storage was made (`size_bytes` > 0) or freed (< 0)."""

    storage: int
    """Number of the storage, the same when it is freed."""
    size_bytes: int
    """Bytes asked for, before any rounding."""
    owner: Owner
    phase: str
    """`start`, `forward`, `backward`, `optimizer`, `evaluation` ..."""
    module: str
    """Name of the model's module that ran, empty outside of all."""
    operation: str
    """Name of the operator that made it, empty for what was there at the start."""


@dataclass(frozen=True, slots=True)
class Work:
    """Operators of one kind and phase: what they computed and moved."""

    phase: str
    operation: str
    dtype: str
    """Of the numbers multiplied: `float32`, `bfloat16` ..."""
    count: int
    flops: int
    moved_bytes: int
    """Bytes of the arguments read and results written, each once."""


@dataclass(frozen=True)
class Trace:
    """One traced step, after a first one that made the optimizer's state."""

    events: tuple[Event, ...]
    work: tuple[Work, ...]
    host_bytes: int = 0
    """Bytes kept in the host's memory: offloaded state, sleeping groups, paged state."""
    checkpoint_bytes: int = 0
    """What a checkpoint takes on the disk."""
    model_bytes: int = 0
    """What the result takes on the disk."""
