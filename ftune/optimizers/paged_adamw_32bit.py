"""AdamW whose float32 states move to host memory when the GPU runs short (Dettmers et al., 2023), from bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.options import AdamOptions
from ftune.plugin import Optimizer, Setting, Sharding


class PagedAdamW32bit(Optimizer):
    name = "paged_adamw_32bit"
    summary = "AdamW with states in unified memory: peaks spill to the host instead of failing; QLoRA's choice."
    sharding = Sharding.ROWS
    pages_state = True
    state_bytes_per_parameter = 8.0
    state_bytes_note = "float32 whatever the weights are; tensors below 100 000 elements are not paged"
    needs = ("bitsandbytes",)
    device_notes: ClassVar[Mapping[str, str]] = {
        "cpu": "without a GPU there is nothing to page: its states are those of adamw_torch in float32"
    }
    Options = AdamOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from bitsandbytes import optim

        # The same mathematics; on a CPU the paged one would warn at every run that it does not page.
        kind = optim.PagedAdamW32bit if setting.device_type == "cuda" else optim.AdamW32bit
        return kind(groups, lr=learning_rate, betas=options.betas, eps=options.eps)


plugin = PagedAdamW32bit()
