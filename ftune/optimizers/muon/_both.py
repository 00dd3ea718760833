"""PyTorch's Muon and AdamW as one optimizer: one list of groups, one state, one `state_dict`."""

from __future__ import annotations

from typing import Any

import torch


class MuonAndAdamW(torch.optim.Optimizer):
    """Moves groups that are `hidden` by Muon, the others by AdamW; both look at this one's groups and state."""

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, options: Any) -> None:
        muon, adamw = ([group for group in groups if group["hidden"] is hidden] for hidden in (True, False))
        self._parts: list[tuple[bool, torch.optim.Optimizer]] = []
        # PyTorch's classes refuse an empty list.
        if muon:
            made: torch.optim.Optimizer = torch.optim.Muon(
                muon,
                lr=learning_rate,
                momentum=options.momentum,
                nesterov=options.nesterov,
                ns_steps=options.ns_steps,
                adjust_lr_fn=options.adjust_lr_fn,
            )
            self._parts.append((True, made))
        if adamw:
            made = torch.optim.AdamW(adamw, lr=learning_rate, betas=options.betas, eps=options.eps)
            self._parts.append((False, made))
        super().__init__([group for _, part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        for hidden, part in self._parts:
            part.param_groups = [group for group in self.param_groups if group["hidden"] is hidden]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for _, part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()  # loading makes new groups and a new state
