"""GaLore (Zhao et al., 2024): AdamW on the gradient's leading singular directions, which change as training goes."""

from __future__ import annotations

from typing import Any

from ftune.embeddings import split_hidden
from ftune.plugin import Optimizer, Setting
from ftune.projected.options import GaLoreOptions, state_bytes


class GaLoreAdamW(Optimizer):
    name = "galore_adamw"
    summary = "AdamW in a low-rank projection of each matrix's gradient: full fine-tuning with a fraction of the state."
    state_bytes_per_parameter = 0.375
    state_bytes_note = (
        "of a 4096 x 4096 matrix at rank 128; one of m x n with m <= n keeps 4 rank / n + 8 rank / m, and 8 where m is "
        "at most the rank; embeddings, output layer and vectors keep 8"
    )
    Options = GaLoreOptions

    def state_bytes(self, shape: tuple[int, ...], options: Any, *, hidden: bool = True) -> float:
        """Return the bytes of state of one tensor; `hidden` is False for embeddings and the output layer."""
        return state_bytes(shape, options, keeps_projection=True, hidden=hidden)

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.fused.kept import RuleOptimizer
        from ftune.projected.galore import GaLore

        return RuleOptimizer(
            split_hidden(groups, setting.model),
            GaLore(options),
            learning_rate=learning_rate,
            seed=setting.seed,
            rounding=options.rounding,
        )


plugin = GaLoreAdamW()
