"""Full fine-tuning: every weight moves."""

from __future__ import annotations

from typing import Any

from ftune.options import Options
from ftune.plugin import Batches, Tuning


class FullOptions(Options):
    """Full fine-tuning has no options."""


class Full(Tuning):
    name = "full"
    summary = "Every weight is trained."
    Options = FullOptions

    def apply(self, model: Any, options: Any, *, batches: Batches) -> Any:
        model.requires_grad_(True)
        return model


plugin = Full()
