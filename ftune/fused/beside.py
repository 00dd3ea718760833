"""Two rules in one backward: a model's own weights by one, those of an adapter beside them by AdamW.

LOMO's authors move LoRA so (Lv et al., 2023, section 4.3): an adapter is small, so its two running means cost little.
"""

from __future__ import annotations

from typing import Any

import torch

from ftune.fused.adamw import AdamWRule
from ftune.fused.rounding import Rounding
from ftune.fused.rule import Rule
from ftune.options import AdamOptions, AdapterRate

Groups = list[dict[str, Any]]


class BesideAdapter(Rule):
    """AdamW for groups that say they hold an adapter, by `adapter`; another rule for the rest."""

    def __init__(self, rule: Rule) -> None:
        adam = AdamOptions()
        self.rule, self.adamw = rule, AdamWRule(adam.betas, adam.eps)

    def fresh(self, weight: torch.Tensor) -> dict[str, Any]:
        # Which rule it is, its group says, which comes with the first gradient.
        return {}

    def update(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rounding: Rounding,
        shape: torch.Size,
    ) -> None:
        rule = self.adamw if group.get("adapter", False) else self.rule
        if not state:
            state.update(rule.fresh(weight))
        rule.update(weight, gradient, state, group, rounding, shape)


def beside_adapter(groups: Groups, rule: Rule, options: AdapterRate) -> tuple[Groups, Rule]:
    """Return groups and rule for an adapter beside trained weights; both as they are where there is none."""
    if not any(group.get("adapter", False) for group in groups):
        return groups, rule
    rated = [{**group, "lr": options.adapter_learning_rate} if group["adapter"] else group for group in groups]
    return rated, BesideAdapter(rule)
