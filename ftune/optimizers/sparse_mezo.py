"""MeZO over the most sensitive weights only, 1 in 1,000 (SensZOQ: Guo et al., 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ftune.errors import Problem, RecipeError
from ftune.options import Integer, Number, Options, Positive, Text
from ftune.places import expanded
from ftune.plugin import Gradients, Optimizer, Setting, TrainedTensor


class SparseMeZOOptions(Options):
    """Options of sparse MeZO."""

    eps: Positive = 1e-3
    """How far along the random direction the two losses are measured."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How float32 results become bfloat16 weights; to nearest, steps below 1/256 of a weight are lost."""
    density: Number = Field(default=0.001, gt=0, le=1)
    """The share of the trained weights that move: those with the largest squared gradients."""
    scope: Literal["global", "tensor"] = "global"
    """Whether that share is of all weights together, or of each tensor."""
    calibration_batches: Integer = Field(default=16, ge=1)
    """Batches whose gradients are squared and summed, once before the first step."""
    mask: Text | None = None
    """Directory of an earlier run of sparse_mezo on the same weights: those that it chose move, and none are chosen."""
    rest_bits: Literal[2, 3, 4, 8] | None = None
    """In how many bits the linear layers' weights that do not move are held from the first step on, in SensZOQ 4; what
    is saved is the plain model with the values that they then have. null leaves them as they are."""
    rest_group_size: Integer = Field(default=64, ge=2)
    """So many of them share a scale and an offset."""


class SparseMeZO(Optimizer):
    name = "sparse_mezo"
    summary = "MeZO that moves only the most sensitive weights: less noise in each step, a small result."
    gradients = Gradients.NONE
    calibrates = True
    state_bytes_per_parameter = 0.004
    state_bytes_note = "4 bytes for each weight that moves, at a density of 0.001"
    default_learning_rate = 1e-6
    learning_rate_reason = "the upper end of the published grid, 1e-7 to 1e-6"
    default_max_grad_norm = 0.0
    max_grad_norm_reason = "what it would clip is a slope along one random direction, for which no bound is customary"
    Options = SparseMeZOOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of a number for each weight that moves, and of the codes of a layer whose rest has some.

        Where all weights move, no numbers are needed.
        """
        if options.density == 1:
            return 0.0
        codes = 0.0
        if options.rest_bits is not None and len(tensor.shape) == 2 and tensor.hidden:
            rows, columns = tensor.shape
            # A scale and an offset in float32 for each group.
            codes = rows * (columns * options.rest_bits / 8 + 8 * columns / options.rest_group_size)
        return float(4 * options.density * tensor.elements + codes)

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.zeroth.optimizer import SparseZerothOrder
        from ftune.zeroth.rest import Rest

        if options.rest_bits and options.density == 1:
            what, fix = "rest_bits: with density 1 no weight rests", "set a density below 1, or leave rest_bits out"
            raise RecipeError(Problem("zeroth-order-rest", what, fix=fix))
        return SparseZerothOrder(
            groups,
            learning_rate=learning_rate,
            eps=options.eps,
            rounding=options.rounding,
            density=options.density,
            calibration_batches=options.calibration_batches,
            scope=options.scope,
            setting=setting,
            rest=Rest(options.rest_bits, options.rest_group_size) if options.rest_bits else None,
            mask=expanded(Path(options.mask)) if options.mask else None,
        )


plugin = SparseMeZO()
