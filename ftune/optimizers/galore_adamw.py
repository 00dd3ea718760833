"""GaLore (Zhao et al., 2024): AdamW on the gradient's leading singular directions, which change as training goes."""

from __future__ import annotations

from typing import Any

from ftune.embeddings import split_hidden
from ftune.plugin import Setting
from ftune.projected.facts import GaLoreFacts
from ftune.projected.options import GaLoreOptions


class GaLoreAdamW(GaLoreFacts):
    name = "galore_adamw"
    summary = "AdamW in a low-rank projection of each matrix's gradient: full fine-tuning with a fraction of the state."
    Options = GaLoreOptions

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
