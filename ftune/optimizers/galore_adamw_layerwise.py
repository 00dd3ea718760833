"""GaLore inside backward (Zhao et al., 2024): each gradient is used as soon as it is there, and freed."""

from __future__ import annotations

from typing import Any

from ftune.embeddings import split_hidden
from ftune.options import FusedOptions
from ftune.plugin import Gradients, Setting
from ftune.projected.facts import GaLoreFacts
from ftune.projected.options import GaLoreOptions


class GaLoreLayerwiseOptions(GaLoreOptions, FusedOptions):
    """Options of GaLore inside backward."""


class GaLoreAdamWLayerwise(GaLoreFacts):
    name = "galore_adamw_layerwise"
    summary = "GaLore that keeps no gradients: neither they nor full Adam states are ever all in memory."
    gradients = Gradients.FUSED
    default_max_grad_norm = 0.0
    max_grad_norm_reason = "the norm of all gradients is known only after a second backward pass"
    Options = GaLoreLayerwiseOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.fused.engine import fused
        from ftune.projected.galore import GaLore

        return fused(split_hidden(groups, setting.model), GaLore(options), learning_rate, options, setting)


plugin = GaLoreAdamWLayerwise()
