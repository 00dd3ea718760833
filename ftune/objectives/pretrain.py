"""Continued pre-training: learn every token of plain text."""

from __future__ import annotations

from typing import Any

from ftune.options import Options
from ftune.plugin import Objective


class PretrainOptions(Options):
    """Continued pre-training has no options of its own."""


class Pretrain(Objective):
    name = "pretrain"
    summary = "Cross-entropy on every token of plain text."
    formats = frozenset({"text"})
    Options = PretrainOptions

    def loss(
        self,
        model: Any,
        batch: dict[str, Any],
        *,
        num_items: Any,
        label_smoothing: float,
        options: Any,
        by_source: Any = None,
    ) -> Any:
        from ftune.losses import causal_cross_entropy

        return causal_cross_entropy(
            model, batch, num_items=num_items, label_smoothing=label_smoothing, by_source=by_source
        )


plugin = Pretrain()
