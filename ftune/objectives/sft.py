"""Supervised fine-tuning: learn what the assistant says, given what was said before."""

from __future__ import annotations

from typing import Any

from ftune.options import Options
from ftune.plugin import Objective


class SFTOptions(Options):
    """Supervised fine-tuning has no options of its own; `data` says what is learned."""


class SFT(Objective):
    name = "sft"
    summary = "Cross-entropy on the assistant's tokens (or the completion's); prompts are not learned."
    formats = frozenset({"messages", "alpaca", "sharegpt", "prompt_completion", "text"})
    Options = SFTOptions

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


plugin = SFT()
