"""AdamW with 8-bit block-wise states (Dettmers et al., 2021), from bitsandbytes."""

from __future__ import annotations

from typing import Any

from ftune.embeddings import embedding_weights, keep_in_32_bits
from ftune.options import Adam8bitOptions
from ftune.plugin import Optimizer, Setting, Sharding, TrainedTensor


class AdamW8bit(Optimizer):
    name = "adamw_8bit"
    summary = "AdamW whose two running means take one byte each; 75 % less optimizer memory."
    sharding = Sharding.ROWS
    state_follows_rows = False
    state_bytes_per_parameter = 2.03125
    state_bytes_note = (
        "two bytes and 2 x 4 / 256 of block scales; 8 bytes for embeddings and for tensors below min_8bit_size"
    )
    needs = ("bitsandbytes",)
    Options = Adam8bitOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of state of one tensor; an embedding's is in 32 bits."""
        return float(options.state_bytes(tensor.elements, in_32_bits=tensor.embedding))

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from bitsandbytes.optim import AdamW8bit as BitsAndBytesAdamW8bit

        made = BitsAndBytesAdamW8bit(
            groups, lr=learning_rate, betas=options.betas, eps=options.eps, min_8bit_size=options.min_8bit_size
        )
        return keep_in_32_bits(made, embedding_weights(setting.model))


plugin = AdamW8bit()
