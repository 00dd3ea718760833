"""8-bit Lion whose states move to host memory when the GPU runs short (Dettmers et al., 2023), from bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.embeddings import embedding_weights, keep_in_32_bits
from ftune.options import Lion8bitOptions
from ftune.plugin import Optimizer, Setting, Sharding, TrainedTensor


class PagedLion8bit(Optimizer):
    name = "paged_lion_8bit"
    summary = "8-bit Lion with states in unified memory: peaks spill to the host instead of failing."
    sharding = Sharding.ROWS
    state_follows_rows = False
    pages_state = True
    state_bytes_per_parameter = 1.015625
    state_bytes_note = (
        "one byte and 4 / 256 of block scales; 4 bytes for embeddings and for tensors below min_8bit_size"
    )
    default_learning_rate = 1e-5
    learning_rate_reason = "every weight moves by the whole rate, so Lion wants 3 to 10 times less than AdamW"
    needs = ("bitsandbytes",)
    device_notes: ClassVar[Mapping[str, str]] = {
        "cpu": "without a GPU there is nothing to page: its states are those of lion_8bit"
    }
    Options = Lion8bitOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of state of one tensor; an embedding's is in 32 bits."""
        return float(options.state_bytes(tensor.elements, in_32_bits=tensor.embedding))

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from bitsandbytes import optim

        # The same mathematics; on a CPU the paged one would warn at every run that it does not page.
        kind = optim.PagedLion8bit if setting.device_type == "cuda" else optim.Lion8bit
        made = kind(groups, lr=learning_rate, betas=options.betas, min_8bit_size=options.min_8bit_size)
        return keep_in_32_bits(made, embedding_weights(setting.model))


plugin = PagedLion8bit()
