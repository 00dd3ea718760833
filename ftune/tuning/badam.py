"""BAdam (Luo et al., 2024): one layer is trained for some steps, then the next, each time from fresh moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ftune.options import Flag, Integer, Options
from ftune.plugin import Batches, StateBytes, Tuning

_SHORTEST, _LONGEST = 50, 100


class BAdamOptions(Options):
    """Options of BAdam."""

    interval: Literal["auto"] | Annotated[Integer, Field(ge=1)] = 50
    """So many optimizer steps move one block; `auto` shares an epoch's steps out among the blocks, 50 to 100 each."""
    order: Literal["random", "ascending", "descending"] = "random"
    """The order in which blocks take turns: a new one by chance for each sweep, from the bottom up, or from the top."""
    include_embedding: Flag = False
    """Whether the embedding is a block too; otherwise it is never trained."""
    include_head: Flag = False
    """Whether the final norm and the output layer are a block too; otherwise they are never trained."""


class BAdam(Tuning):
    name = "badam"
    summary = "One layer is trained for some steps, then the next, with a float32 copy of that layer alone."
    split_note = "weights that take turns are not split in this version"
    rotates = True
    Options = BAdamOptions

    def apply(self, model: Any, options: Any, *, batches: Batches) -> Any:
        from ftune.rotation.units import units_of

        model.requires_grad_(True)
        units = units_of(model)
        for unit, included in ((units.embedding, options.include_embedding), (units.head, options.include_head)):
            for weight in unit.weights:
                weight.requires_grad_(included)
        return model

    def copies_in_float32(self, options: Any) -> bool:
        return True

    def state_bytes(self, model: Any, trained: Sequence[Any], of: StateBytes, options: Any) -> float:
        """Return the bytes of the largest block's states and float32 copies; the other blocks have none."""
        from ftune.rotation.sizes import bytes_of_units
        from ftune.rotation.units import units_of

        return max(bytes_of_units(units_of(model).in_order, trained, of, with_masters=True))

    def sweep(
        self, model: Any, trained: Sequence[Any], options: Any, *, steps: int, steps_per_epoch: int
    ) -> tuple[int, str]:
        """Return the steps of a sweep, an interval for each block."""
        from ftune.rotation.units import trained_units, units_of

        blocks = len(trained_units(units_of(model).in_order, trained))
        needed = blocks * _interval_of(options, steps_per_epoch, blocks)
        return needed, f"tuning.interval: {steps // blocks}" if steps >= blocks else ""

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
        from ftune.rotation.plans import Turns
        from ftune.rotation.units import units_of

        blocks = parts_of(units_of(model).in_order, groups, build, with_masters=True)
        order = list(range(len(blocks)))
        if options.order == "descending":
            order.reverse()
        interval = _interval_of(options, steps_per_epoch, len(blocks))
        plan = Turns(
            [(number,) for number in order], interval=interval, seed=seed if options.order == "random" else None
        )
        return RotatingOptimizer(blocks, plan, asleep="drop")


def _interval_of(options: Any, steps_per_epoch: int, blocks: int) -> int:
    return customary_interval(steps_per_epoch, blocks) if options.interval == "auto" else int(options.interval)


def customary_interval(steps_per_epoch: int, blocks: int) -> int:
    """Return the paper's K = min(max(n / (B D), 50), 100): n / B steps of an epoch shared out among D blocks."""
    return min(max(steps_per_epoch // blocks, _SHORTEST), _LONGEST)


plugin = BAdam()
