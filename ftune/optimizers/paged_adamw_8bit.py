"""8-bit AdamW whose states move to host memory when the GPU runs short (Dettmers et al., 2023), from bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.embeddings import embedding_weights, keep_in_32_bits
from ftune.options import Adam8bitOptions
from ftune.plugin import Optimizer, Setting, Sharding, TrainedTensor


class PagedAdamW8bit(Optimizer):
    name = "paged_adamw_8bit"
    summary = "8-bit AdamW with states in unified memory: peaks spill to the host instead of failing."
    sharding = Sharding.ROWS
    state_follows_rows = False
    pages_state = True
    state_bytes_per_parameter = 2.03125
    state_bytes_note = (
        "two bytes and 2 x 4 / 256 of block scales; 8 bytes for embeddings and for tensors below min_8bit_size"
    )
    needs = ("bitsandbytes",)
    device_notes: ClassVar[Mapping[str, str]] = {
        "cpu": "without a GPU there is nothing to page: its states are those of adamw_8bit"
    }
    Options = Adam8bitOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of state of one tensor; an embedding's is in 32 bits."""
        return float(options.state_bytes(tensor.elements, in_32_bits=tensor.embedding))

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from bitsandbytes import optim

        # The same mathematics; on a CPU the paged one would warn at every run that it does not page.
        kind = optim.PagedAdamW8bit if setting.device_type == "cuda" else optim.AdamW8bit
        made = kind(groups, lr=learning_rate, betas=options.betas, eps=options.eps, min_8bit_size=options.min_8bit_size)
        return keep_in_32_bits(made, embedding_weights(setting.model))


plugin = PagedAdamW8bit()
