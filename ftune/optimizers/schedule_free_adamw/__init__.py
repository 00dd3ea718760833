"""Schedule-free AdamW (Defazio et al., 2024): an average of the weights in place of a falling learning rate."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ftune.options import AdamOptions, NotNegative, Number
from ftune.plugin import Optimizer, Setting, Sharding


class ScheduleFreeOptions(AdamOptions):
    """Options of schedule-free AdamW."""

    betas: tuple[Annotated[Number, Field(gt=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """How near the average gradients are taken, and decay rate of the running mean of their squares."""
    weight_lr_power: NotNegative = 2.0
    """A step counts in the average by the largest rate so far to this power, so that those of the warmup count less."""
    r: NotNegative = 0.0
    """Later steps count more, by their number to this power."""


class ScheduleFreeAdamW(Optimizer):
    name = "schedule_free_adamw"
    averages = True
    summary = "AdamW that averages its weights in place of a schedule: the length of the run need not be known."
    sharding = Sharding.ROWS
    state_bytes_per_parameter = 8.0
    state_bytes_note = "4 bytes where weights are bfloat16; a copy of the weights besides while evaluating and saving"
    state_in_weights_dtype = True
    default_learning_rate = 1e-4
    learning_rate_reason = "no schedule lowers it, and its authors advise 1 to 10 times AdamW's peak"
    needs = ("schedulefree",)
    Options = ScheduleFreeOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.optimizers.schedule_free_adamw._exact import ExactScheduleFree

        # One weight at a time: all at once would take 4 bytes per weight for a moment.
        return ExactScheduleFree(
            groups,
            lr=learning_rate,
            betas=options.betas,
            eps=options.eps,
            weight_lr_power=options.weight_lr_power,
            r=options.r,
            foreach=False,
        )


plugin = ScheduleFreeAdamW()
