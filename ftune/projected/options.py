"""Options of the projected methods, and the bytes of state that follow from them, without PyTorch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ftune.options import AdamOptions, Integer, Number, Positive

Side = Literal["std", "reverse_std", "left", "right"]
AtLeastOne = Annotated[Integer, Field(ge=1)]


class ProjectedOptions(AdamOptions):
    """Options of Adam in a low-rank projection of the gradient."""

    rank: AtLeastOne = 128
    """Rows (or columns) that a projected gradient keeps; a matrix no wider than this gets plain AdamW."""
    update_proj_gap: AtLeastOne = 200
    """Steps after which the projection is made anew."""
    proj_type: Side = "std"
    """Side projected: `std` the shorter, which saves most, `reverse_std` the longer; `left` rows, `right` columns."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How results become bfloat16 weights: by chance, so that small updates count on average, or to the nearest."""


class GaLoreOptions(ProjectedOptions):
    """Options of GaLore."""

    scale: Positive = 0.25
    """Factor on the step of projected matrices; the rest takes the learning rate as it is."""


class ApolloOptions(ProjectedOptions):
    """Options of APOLLO; APOLLO-Mini is rank 1, scale 128, scale_type tensor."""

    scale: Positive = 1.0
    """The step of projected matrices is multiplied by its square root; at 1 it is sqrt(rank / width) of Adam's."""
    scale_type: Literal["channel", "tensor"] = "channel"
    """One learning rate for each channel of the longer side, or one for the whole matrix."""
    norm_growth_limit: Annotated[Number, Field(gt=1)] | None = 1.01
    """How many times a matrix's step may be as long as its last one; null for any. It does the work of clipping."""


def is_projected(shape: tuple[int, ...], rank: int) -> bool:
    """Return whether a tensor of a shape is projected: a matrix that keeps less than it has."""
    return len(shape) == 2 and min(shape) > rank


def on_the_left(shape: tuple[int, ...], side: Side) -> bool:
    """Return whether a matrix (m, n) is projected to (rank, n), and not to (m, rank)."""
    if side in ("left", "right"):
        return side == "left"
    return (shape[0] <= shape[1]) == (side == "std")


def state_bytes(shape: tuple[int, ...], options: ProjectedOptions, *, keeps_projection: bool, hidden: bool) -> int:
    """Return the bytes of optimizer state of one tensor; `hidden` is False for embeddings and the output layer."""
    elements = 1
    for size in shape:
        elements *= size
    if not hidden or not is_projected(shape, options.rank):
        return 8 * elements
    projected, other = shape if on_the_left(shape, options.proj_type) else shape[::-1]
    return options.rank * (8 * other + (4 * projected if keeps_projection else 0))
