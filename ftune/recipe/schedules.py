"""The options of each learning rate schedule: what `training.lr_scheduler_kwargs` may say.

Hugging Face hands them to the schedule's function, which fails on an unknown one after the model is loaded, or
(for `constant`) ignores it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ftune.options import Fraction, Integer, NotNegative, Options, Positive


class NoOptions(Options):
    """This schedule has no options."""


class Cosine(Options):
    """Half a cosine wave, down to zero."""

    num_cycles: Positive = 0.5
    """How many waves: 0.5 falls once from the peak to zero."""


class CosineWithRestarts(Options):
    """Cosine waves, each starting at the peak again."""

    num_cycles: Integer = Field(default=1, ge=1)
    """How often it falls from the peak to zero."""


class CosineWithMinimum(Options):
    """Half a cosine wave, down to a least learning rate."""

    num_cycles: Positive = 0.5
    """How many waves: 0.5 falls once from the peak to the least rate."""
    min_lr: NotNegative | None = None
    """The least learning rate; give this or `min_lr_rate`."""
    min_lr_rate: Fraction | None = None
    """The least learning rate as a fraction of the peak."""


class Polynomial(Options):
    """A power of the steps that are left."""

    lr_end: NotNegative = 1e-7
    """The learning rate at the end; below `training.learning_rate`."""
    power: Positive = 1.0
    """1 falls in a straight line, 2 faster at first."""


class InverseSquareRoot(Options):
    """Falls with the square root of the step."""

    timescale: Integer | None = Field(default=None, ge=1)
    """Steps over which it falls to 0.7 of the peak; null takes the warmup steps."""


class WarmupStableDecay(Options):
    """Rises, stays, falls."""

    num_decay_steps: Integer = Field(ge=1)
    """Steps over which it falls, at the end."""
    num_stable_steps: Integer | None = Field(default=None, ge=0)
    """Steps at the peak; null takes all that are left between rise and fall."""
    warmup_type: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Shape of the rise."""
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "cosine"
    """Shape of the fall."""
    min_lr_ratio: Fraction = 0.0
    """The least learning rate as a fraction of the peak."""
    num_cycles: Positive = 0.5
    """How many waves a cosine rise or fall has."""


SCHEDULES: dict[str, type[Options]] = {
    "linear": NoOptions,
    "cosine": Cosine,
    "cosine_with_restarts": CosineWithRestarts,
    "polynomial": Polynomial,
    "constant": NoOptions,
    "constant_with_warmup": NoOptions,
    "inverse_sqrt": InverseSquareRoot,
    "cosine_with_min_lr": CosineWithMinimum,
    "warmup_stable_decay": WarmupStableDecay,
}
"""The options of each schedule, by Hugging Face's name."""


def steps_of_decay(options: Mapping[str, Any], warmup_steps: float, num_steps: int) -> int:
    """Return how many steps `warmup_stable_decay` rises and falls; Hugging Face counts a share of steps as here."""
    rise = int(warmup_steps) if warmup_steps >= 1 else math.ceil(num_steps * warmup_steps)
    return rise + int(options.get("num_decay_steps") or 0)
