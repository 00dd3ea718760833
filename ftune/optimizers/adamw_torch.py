"""AdamW (Loshchilov and Hutter, 2019), PyTorch's own."""

from __future__ import annotations

from typing import Any

from ftune.options import AdamOptions
from ftune.plugin import Optimizer, Setting, Sharding


class AdamW(Optimizer):
    name = "adamw_torch"
    summary = "Two float32 running means per weight; the reference every other optimizer is compared with."
    sharding = Sharding.ROWS
    computes = "adamw"
    state_bytes_per_parameter = 8.0
    state_bytes_note = "4 bytes where weights are bfloat16: states take the weights' dtype"
    state_in_weights_dtype = True
    Options = AdamOptions

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        import torch

        return torch.optim.AdamW(groups, lr=learning_rate, betas=options.betas, eps=options.eps)


plugin = AdamW()
