"""HiFT (Liu et al., 2024): every weight is trained, one group of layers at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field

from ftune.options import Flag, Integer, Options
from ftune.plugin import Batches, StateBytes, Tuning


class HiFTOptions(Options):
    """Options of HiFT."""

    group_size: Integer = Field(default=1, ge=1)
    """How many units move together; units are the embedding, each layer, and the head (final norm and output layer)."""
    order: Literal["bottom2up", "top2down", "random"] = "bottom2up"
    """The order in which groups take turns: from the embedding up, from the head down, or shuffled once by the seed."""
    mixed: Flag = False
    """Move float32 copies of 16-bit weights (the paper's mixed "Hi"); only the moving group's are on the device."""


class HiFT(Tuning):
    name = "hift"
    summary = "Every weight is trained, one group of layers at each step; the rest of the state is on the host."
    split_note = "weights that take turns are not split in this version"
    rotates = True
    Options = HiFTOptions

    def apply(self, model: Any, options: Any, *, batches: Batches) -> Any:
        model.requires_grad_(True)
        return model

    def copies_in_float32(self, options: Any) -> bool:
        return bool(options.mixed)

    def state_bytes(self, model: Any, trained: Sequence[Any], of: StateBytes, options: Any) -> float:
        """Return the bytes of all states, and of the float32 copies."""
        from ftune.rotation.sizes import state_bytes

        return state_bytes(trained, of, with_masters=options.mixed)

    def sweep(
        self, model: Any, trained: Sequence[Any], options: Any, *, steps: int, steps_per_epoch: int
    ) -> tuple[int, str]:
        """Return the steps of a sweep, one for each group."""
        from ftune.rotation.units import trained_units, units_of

        units = len(trained_units(units_of(model).in_order, trained))
        return math.ceil(units / options.group_size), f"tuning.group_size: {math.ceil(units / steps)}"

    def rotating(
        self,
        model: Any,
        groups: list[dict[str, Any]],
        build: Callable[[list[dict[str, Any]]], Any],
        options: Any,
        *,
        seed: int,
        steps_per_epoch: int,
    ) -> Any:
        from ftune.rotation.optimizer import RotatingOptimizer, parts_of
        from ftune.rotation.plans import Turns, shuffled
        from ftune.rotation.units import units_of

        parts = parts_of(units_of(model).in_order, groups, build, with_masters=options.mixed)
        order = shuffled(len(parts), seed=seed) if options.order == "random" else list(range(len(parts)))
        if options.order == "top2down":
            order.reverse()
        size = options.group_size
        turns = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
        # The delayed update of the learning rate: all groups of one sweep move at the same rate.
        return RotatingOptimizer(parts, Turns(turns), asleep="host", steps_per_rate=len(turns))


plugin = HiFT()
