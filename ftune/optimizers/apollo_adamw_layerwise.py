"""APOLLO inside backward (Zhu et al., 2024): each gradient is used as soon as it is there, and freed."""

from __future__ import annotations

from typing import Any

from ftune.embeddings import split_hidden
from ftune.options import FusedOptions
from ftune.plugin import Gradients, Setting
from ftune.projected.facts import ApolloFacts
from ftune.projected.options import ApolloOptions


class ApolloLayerwiseOptions(ApolloOptions, FusedOptions):
    """Options of APOLLO inside backward."""


class ApolloAdamWLayerwise(ApolloFacts):
    name = "apollo_adamw_layerwise"
    summary = "APOLLO that keeps no gradients: about the memory of inference, with AdamW's kind of step."
    gradients = Gradients.FUSED
    default_max_grad_norm = 0.0
    max_grad_norm_reason = "norm_growth_limit bounds each step, and a global norm would cost a second backward pass"
    Options = ApolloLayerwiseOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.fused.engine import fused
        from ftune.projected.apollo import Apollo

        return fused(
            split_hidden(groups, setting.model), Apollo(options, setting.seed), learning_rate, options, setting
        )


plugin = ApolloAdamWLayerwise()
