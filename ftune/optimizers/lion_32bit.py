"""Lion (Chen et al., 2023), from bitsandbytes."""

from __future__ import annotations

from typing import Any

from ftune.options import Fraction, Options
from ftune.plugin import Optimizer, Setting, Sharding


class LionOptions(Options):
    """Options of Lion."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Weight of the momentum in the update, and decay rate of the momentum."""


class Lion32bit(Optimizer):
    name = "lion_32bit"
    summary = "The sign of a momentum: one float32 state per weight, half of AdamW's."
    sharding = Sharding.ROWS
    state_bytes_per_parameter = 4.0
    state_bytes_note = "float32 whatever the weights are"
    default_learning_rate = 1e-5
    learning_rate_reason = "every weight moves by the whole rate, so Lion wants 3 to 10 times less than AdamW"
    needs = ("bitsandbytes",)
    Options = LionOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from bitsandbytes.optim import Lion32bit as BitsAndBytesLion32bit

        return BitsAndBytesLion32bit(groups, lr=learning_rate, betas=options.betas)


plugin = Lion32bit()
