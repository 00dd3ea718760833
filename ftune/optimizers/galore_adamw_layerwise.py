"""GaLore inside backward (Zhao et al., 2024): each gradient is used as soon as it is there, and freed."""

from __future__ import annotations

from typing import Any

from ftune.embeddings import split_hidden
from ftune.options import FusedOptions
from ftune.plugin import Gradients, Optimizer, Setting
from ftune.projected.options import GaLoreOptions, state_bytes


class GaLoreLayerwiseOptions(GaLoreOptions, FusedOptions):
    """Options of GaLore inside backward."""


class GaLoreAdamWLayerwise(Optimizer):
    name = "galore_adamw_layerwise"
    summary = "GaLore that keeps no gradients: neither they nor full Adam states are ever all in memory."
    gradients = Gradients.FUSED
    state_bytes_per_parameter = 0.375
    state_bytes_note = (
        "of a 4096 x 4096 matrix at rank 128; one of m x n with m <= n keeps 4 rank / n + 8 rank / m, and 8 where m is "
        "at most the rank; embeddings, output layer and vectors keep 8"
    )
    default_max_grad_norm = 0.0
    max_grad_norm_reason = "the norm of all gradients is known only after a second backward pass"
    Options = GaLoreLayerwiseOptions

    def state_bytes(self, shape: tuple[int, ...], options: Any, *, hidden: bool = True) -> float:
        """Return the bytes of state of one tensor; `hidden` is False for embeddings and the output layer."""
        return state_bytes(shape, options, keeps_projection=True, hidden=hidden)

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.fused.engine import fused
        from ftune.projected.galore import GaLore

        return fused(split_hidden(groups, setting.model), GaLore(options), learning_rate, options, setting)


plugin = GaLoreAdamWLayerwise()
