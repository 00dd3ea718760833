"""LISA (Pan et al., 2024): the embedding, the head and a few layers drawn by chance are trained at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from ftune.errors import Problem, RecipeError
from ftune.options import Integer, Options
from ftune.plugin import Batches, StateBytes, Tuning


class LISAOptions(Options):
    """Options of LISA."""

    activated_layers: Integer = Field(default=2, ge=1)
    """How many layers move at a time, beside the embedding and the head."""
    interval: Integer = Field(default=20, ge=1)
    """After so many optimizer steps other layers are drawn."""


class LISA(Tuning):
    name = "lisa"
    summary = "The embedding, the head and a few layers, drawn anew every few steps, are trained at a time."
    split_note = "weights that take turns are not split in this version"
    rotates = True
    Options = LISAOptions

    def apply(self, model: Any, options: Any, *, batches: Batches) -> Any:
        model.requires_grad_(True)
        return model

    def state_bytes(self, model: Any, trained: Sequence[Any], of: StateBytes, options: Any) -> float:
        """Return the bytes of the states of both ends and of the largest layers that can move together."""
        from ftune.rotation.sizes import bytes_of_units
        from ftune.rotation.units import units_of

        units = units_of(model)
        layers = sorted(bytes_of_units(units.layers, trained, of), reverse=True)
        return sum(layers[: options.activated_layers]) + sum(bytes_of_units((units.embedding, units.head), trained, of))

    def sweep(
        self, model: Any, trained: Sequence[Any], options: Any, *, steps: int, steps_per_epoch: int
    ) -> tuple[int, str]:
        """Return the steps in which every layer can be drawn once; chance may take longer."""
        from ftune.rotation.units import trained_units, units_of

        layers = len(trained_units(units_of(model).layers, trained))
        draws = math.ceil(layers / options.activated_layers)
        setting = f"tuning.interval: {steps // draws}" if steps >= draws else ""
        return draws * options.interval, setting

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
        from ftune.rotation.plans import Draws
        from ftune.rotation.units import units_of

        units = units_of(model)
        layers = parts_of(units.layers, groups, build)
        ends = parts_of((units.embedding, units.head), groups, build)
        count = options.activated_layers
        if count > len(layers):
            what = f"tuning.activated_layers: {count} layers cannot move at a time"
            fix = f"write {len(layers)} or less; all of them is what tuning.method: full does"
            raise RecipeError(Problem("lisa-layers", what, why=f"this model has {len(layers)} layers", fix=fix))
        parts = layers + ends
        numbers = range(len(parts))
        drawn, always = numbers[: len(layers)], numbers[len(layers) :]
        plan = Draws(always, drawn, count=count, interval=options.interval, seed=seed)
        return RotatingOptimizer(parts, plan, asleep="drop")


plugin = LISA()
