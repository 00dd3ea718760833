"""AdEMAMix with 8-bit states (Pagliardini et al., 2024), from bitsandbytes."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ftune.options import Fraction, Integer, NotNegative, Options
from ftune.plugin import Optimizer, Setting


class AdEMAMix8bitOptions(Options):
    """Options of 8-bit AdEMAMix."""

    betas: tuple[Fraction, Fraction, Fraction] = (0.9, 0.999, 0.9999)
    """Decay rates of the fast mean, of the mean of squares, and of the slow mean."""
    alpha: NotNegative = 5.0
    """Weight of the slow mean beside the fast one."""
    min_8bit_size: Integer = Field(default=4096, ge=1)
    """Tensors with fewer elements keep 32-bit states."""


class AdEMAMix8bit(Optimizer):
    name = "ademamix_8bit"
    summary = "AdamW with a second, slow mean of the gradient: three 8-bit states per weight."
    state_bytes_per_parameter = 3.046875
    state_bytes_note = "three bytes and 3 x 4 / 256 of block scales; 12 bytes for tensors below min_8bit_size"
    default_learning_rate = 2.5e-5
    learning_rate_reason = "the slow mean adds to each step, so it wants half of AdamW's"
    needs = ("bitsandbytes",)
    Options = AdEMAMix8bitOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from bitsandbytes.optim import AdEMAMix8bit as BitsAndBytesAdEMAMix8bit

        return BitsAndBytesAdEMAMix8bit(
            groups,
            lr=learning_rate,
            betas=options.betas,
            alpha=options.alpha,
            min_8bit_size=options.min_8bit_size,
        )


plugin = AdEMAMix8bit()
