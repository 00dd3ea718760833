"""APOLLO (Zhu et al., 2024): the gradient, each channel scaled as AdamW would in a random projection of it."""

from __future__ import annotations

from typing import Any

from ftune.embeddings import split_hidden
from ftune.plugin import Optimizer, Setting
from ftune.projected.options import ApolloOptions, state_bytes


class ApolloAdamW(Optimizer):
    name = "apollo_adamw"
    summary = "AdamW's learning rate for each channel, from a random projection; at rank 1 (Mini) almost no state."
    state_bytes_per_parameter = 0.25
    state_bytes_note = (
        "of a 4096 x 4096 matrix at rank 128; one of m x n with m <= n keeps 8 rank / m, and 8 where m is at most the "
        "rank; embeddings, output layer and vectors keep 8"
    )
    Options = ApolloOptions

    def state_bytes(self, shape: tuple[int, ...], options: Any, *, hidden: bool = True) -> float:
        """Return the bytes of state of one tensor; `hidden` is False for embeddings and the output layer."""
        return state_bytes(shape, options, keeps_projection=False, hidden=hidden)

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
