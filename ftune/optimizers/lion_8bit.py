"""Lion with 8-bit momentum (Chen et al., 2023; Dettmers et al., 2021), from bitsandbytes."""

from __future__ import annotations

from typing import Any

from ftune.embeddings import embedding_weights, keep_in_32_bits
from ftune.options import Lion8bitOptions
from ftune.plugin import Optimizer, Setting, Sharding, TrainedTensor


class Lion8bit(Optimizer):
    name = "lion_8bit"
    summary = "The sign of a momentum: one 8-bit state per weight."
    sharding = Sharding.ROWS
    state_follows_rows = False
    state_bytes_per_parameter = 1.015625
    state_bytes_note = (
        "one byte and 4 / 256 of block scales; 4 bytes for embeddings and for tensors below min_8bit_size"
    )
    default_learning_rate = 1e-5
    learning_rate_reason = "every weight moves by the whole rate, so Lion wants 3 to 10 times less than AdamW"
    needs = ("bitsandbytes",)
    Options = Lion8bitOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of state of one tensor; an embedding's is in 32 bits."""
        return float(options.state_bytes(tensor.elements, in_32_bits=tensor.embedding))

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from bitsandbytes.optim import Lion8bit as BitsAndBytesLion8bit

        made = BitsAndBytesLion8bit(groups, lr=learning_rate, betas=options.betas, min_8bit_size=options.min_8bit_size)
        return keep_in_32_bits(made, embedding_weights(setting.model))


plugin = Lion8bit()
