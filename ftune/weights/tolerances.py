"""How far weights stored in a type may take a model from what it was in float32."""

from __future__ import annotations

from ftune.plugin import Tolerance

ROUNDED = frozenset({"bfloat16", "float16"})
FLOATS = {
    "float32": Tolerance("largest logit difference", 1e-3),  # sums in another order give about 1e-4
    # Ten times what a SmolLM2-135M with a strong adapter shows.
    "bfloat16": Tolerance("mean KL", 2e-3),
    "float16": Tolerance("mean KL", 1e-4),
}
