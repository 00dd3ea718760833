"""APOLLO inside backward (Zhu et al., 2024): each gradient is used as soon as it is there, and freed."""

from __future__ import annotations

from typing import Any

from ftune.embeddings import split_hidden
from ftune.options import FusedOptions
from ftune.plugin import Gradients, Optimizer, Setting
from ftune.projected.options import ApolloOptions, state_bytes


class ApolloLayerwiseOptions(ApolloOptions, FusedOptions):
    """Options of APOLLO inside backward."""


class ApolloAdamWLayerwise(Optimizer):
    name = "apollo_adamw_layerwise"
    summary = "APOLLO that keeps no gradients: about the memory of inference, with AdamW's kind of step."
    gradients = Gradients.FUSED
    state_bytes_per_parameter = 0.25
    state_bytes_note = (
        "of a 4096 x 4096 matrix at rank 128; one of m x n with m <= n keeps 8 rank / m, and 8 where m is at most the "
        "rank; embeddings, output layer and vectors keep 8"
    )
    default_max_grad_norm = 0.0
    max_grad_norm_reason = "norm_growth_limit bounds each step, and a global norm would cost a second backward pass"
    Options = ApolloLayerwiseOptions

    def state_bytes(self, shape: tuple[int, ...], options: Any, *, hidden: bool = True) -> float:
        """Return the bytes of state of one tensor; `hidden` is False for embeddings and the output layer."""
        return state_bytes(shape, options, keeps_projection=False, hidden=hidden)

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.fused.engine import fused
        from ftune.projected.apollo import Apollo

        return fused(
            split_hidden(groups, setting.model), Apollo(options, setting.seed), learning_rate, options, setting
        )


plugin = ApolloAdamWLayerwise()
