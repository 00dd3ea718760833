"""Full fine-tuning: every weight moves."""

from __future__ import annotations

from typing import Any

from ftune.errors import Problem, RecipeError
from ftune.options import Options
from ftune.plugin import Tuning


class FullOptions(Options):
    """Full fine-tuning has no options."""


class Full(Tuning):
    name = "full"
    summary = "Every weight is trained."
    Options = FullOptions

    def apply(self, model: Any, options: Any) -> Any:
        if getattr(model, "is_quantized", False):
            what = "full fine-tuning cannot move the weights of a quantised model"
            fix = "set tuning.method: lora, or name the unquantised model"
            raise RecipeError(Problem("base-quantised", what, why="they are stored as integers", fix=fix))
        model.requires_grad_(True)
        return model


plugin = Full()
