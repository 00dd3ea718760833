"""Whether groups of inputs fit layers; asked without torch before a model is loaded, and of its layers afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ftune.errors import Place, Problem


def uneven(
    in_features: int, group_size: int, layer: str, *, every: Iterable[int] = (), place: Place | None = None
) -> Problem | None:
    """Return the problem of a layer whose inputs are no whole number of groups.

    It says what divides them, and the inputs of `every` other layer.
    """
    if in_features % group_size == 0:
        return None
    fitting = [size for size in (8, 16, 32, 64, 128, 256) if math.gcd(in_features, *every) % size == 0]
    fix = f"choose a group_size that divides it: {', '.join(map(str, fitting))}" if fitting else "leave this layer out"
    why = f"a group is {group_size} consecutive inputs with one scale and one offset"
    what = f"{layer} has {in_features} inputs, which are no whole number of groups of {group_size}"
    return Problem("group-size", what, place, why=why, fix=fix)
