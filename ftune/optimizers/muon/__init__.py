"""Muon (Jordan et al., 2024), PyTorch's own, for hidden matrices, with AdamW for everything else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ftune.embeddings import split_hidden
from ftune.options import AdamOptions, Flag, Fraction, Integer
from ftune.plugin import Optimizer, Setting, TrainedTensor


class MuonOptions(AdamOptions):
    """Options of Muon; betas and eps are those of AdamW, which moves embeddings, output layer and vectors."""

    momentum: Fraction = 0.95
    """Decay rate of the running mean of a hidden matrix's gradient."""
    nesterov: Flag = True
    """Look ahead along the momentum."""
    ns_steps: Annotated[Integer, Field(ge=1, lt=100)] = 5
    """Newton-Schulz iterations that bring the singular values of a step near 1."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Scale steps to the length of AdamW's, so that both share a learning rate, or as Jordan did (rates near 0.02)."""


class Muon(Optimizer):
    name = "muon"
    summary = "Steps whose singular values are all near 1, from one momentum; AdamW for embeddings and vectors."
    state_bytes_per_parameter = 4.0
    state_bytes_note = "8 for embeddings, output layer and vectors; half where weights are bfloat16"
    Options = MuonOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of state of one tensor: a momentum of hidden matrices, AdamW's means of the rest."""
        means = 1 if tensor.hidden and len(tensor.shape) == 2 else 2
        return means * tensor.element_bytes * tensor.elements

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from ftune.optimizers.muon._both import MuonAndAdamW

        return MuonAndAdamW(split_hidden(groups, setting.model), learning_rate, options)


plugin = Muon()
