"""What GaLore and APOLLO declare of their state, whether their gradients are kept or not."""

from __future__ import annotations

from typing import Any

from ftune.plugin import Optimizer, TrainedTensor
from ftune.projected.options import state_bytes


class GaLoreFacts(Optimizer):
    """Adam's means of the projected gradient, and the projection."""

    state_bytes_per_parameter = 0.375
    state_bytes_note = (
        "of a 4096 x 4096 matrix at rank 128; one of m x n with m <= n keeps 4 rank / n + 8 rank / m, and 8 where m is "
        "at most the rank; embeddings, output layer and vectors keep 8"
    )

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of state of one tensor."""
        return state_bytes(tensor.shape, options, keeps_projection=True, hidden=tensor.hidden)


class ApolloFacts(Optimizer):
    """Adam's means of the projected gradient alone: the projection comes from a seed."""

    state_bytes_per_parameter = 0.25
    state_bytes_note = (
        "of a 4096 x 4096 matrix at rank 128; one of m x n with m <= n keeps 8 rank / m, and 8 where m is at most the "
        "rank; embeddings, output layer and vectors keep 8"
    )

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of state of one tensor."""
        return state_bytes(tensor.shape, options, keeps_projection=False, hidden=tensor.hidden)
