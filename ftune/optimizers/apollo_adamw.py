"""APOLLO (Zhu et al., 2024): the gradient, each channel scaled as AdamW would in a random projection of it."""

from __future__ import annotations

from typing import Any

from ftune.embeddings import split_hidden
from ftune.plugin import Setting
from ftune.projected.facts import ApolloFacts
from ftune.projected.options import ApolloOptions


class ApolloAdamW(ApolloFacts):
    name = "apollo_adamw"
    summary = "AdamW's learning rate for each channel, from a random projection; at rank 1 (Mini) almost no state."
    Options = ApolloOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.fused.kept import RuleOptimizer
        from ftune.projected.apollo import Apollo

        return RuleOptimizer(
            split_hidden(groups, setting.model),
            Apollo(options, setting.seed),
            learning_rate=learning_rate,
            seed=setting.seed,
            rounding=options.rounding,
        )


plugin = ApolloAdamW()
