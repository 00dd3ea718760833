"""The down projection of QA-LoRA (Xu et al., 2023, arXiv 2309.14717): it reads sums over groups of inputs.

    y = x W~ + s (p A^T) B^T,     p_l = sum of x_i over group l        (algorithm 1; A is r x groups)

Every weight of a group is thereby moved by the same number, s (B A)_jl: plain LoRA whose A repeats each column for all
inputs of the group. That is how it is written to the disk, so that PEFT reads it without knowing of groups.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ftune.adapters.options import LowRankOptions
from ftune.errors import Problem, RunError


class PooledLinear(nn.Module):
    """x (..., in_features) to (..., rank), through one weight for each group; keeps only the sums for the gradient."""

    def __init__(self, in_features: int, groups: int, rank: int, group_index: torch.Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.groups = in_features, groups
        self.weight = nn.Parameter(torch.empty(rank, groups))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as PEFT starts A
        self.register_buffer("order", by_group(group_index), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In float32 whatever is computed in: sums of float16 activations overflow where a few channels are large.
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        if self.order is not None:
            x = x[..., self.order]
        pooled = x.unflatten(-1, (self.groups, -1)).sum(dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(pooled, self.weight.to(pooled.dtype))

    def expanded(self, weight: torch.Tensor) -> torch.Tensor:
        """Return A (rank, groups) as plain LoRA's (rank, in_features)."""
        wide = weight.repeat_interleave(self.in_features // self.groups, dim=1)
        if self.order is None:
            return wide
        return torch.empty_like(wide).index_copy_(1, self.order, wide)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.expanded(destination[prefix + "weight"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = prefix + "weight"
        if key in state_dict and state_dict[key].shape[1] == self.in_features:
            state_dict[key] = contracted(state_dict[key], self.groups, self.order)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def contracted(weight: torch.Tensor, groups: int, order: torch.Tensor | None) -> torch.Tensor:
    """Return plain LoRA's A (rank, in_features) as (rank, groups); raises RunError where a group's columns differ.

    `order` lists the inputs by group, where groups are not consecutive.
    """
    grouped = (weight if order is None else weight[:, order]).unflatten(1, (groups, -1))
    if not torch.equal(grouped, grouped[..., :1].expand_as(grouped)):
        what = "an adapter over these groups was expected, and this one differs within them"
        fix = "use the adapter that was trained with tuning.method: qalora and the same group_size"
        raise RunError(Problem("adapter-groups", what, fix=fix))
    return grouped[..., 0].contiguous()


def by_group(group_index: torch.Tensor | None) -> torch.Tensor | None:
    """Return the inputs in the order of their groups, which are all of one size; None where that is as they are."""
    return None if group_index is None else torch.argsort(group_index, stable=True)


def add_pooled_lora(model: Any, names: list[str], options: LowRankOptions, *, over: type[nn.Module]) -> Any:
    """Return a PEFT model with a LoRA whose A is pooled on each named layer, all of them of the kind `over`.

    Such a layer says of its groups with `codes.groups` and `codes.group_index`.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=names,
    )
    accept(config, over)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # said of every kind that is put in by `accept`
        adapted = get_peft_model(model, config)
    for name in names:
        layer = model.get_submodule(name)
        codes, device = layer.get_base_layer().codes, layer.lora_A["default"].weight.device
        pooled = PooledLinear(codes.in_features, codes.groups, options.r, codes.group_index)
        layer.lora_A["default"] = pooled.to(device)
    return adapted


def accept(config: Any, kind: type[nn.Module]) -> None:
    """Let PEFT put its LoRA on a kind of layer that it does not know, as on `nn.Linear`."""
    from peft.tuners.lora import Linear

    config._register_custom_module({kind: Linear})


def fold_pooled(adapted: Any, *, over: type[nn.Module]) -> Any:
    """Return the base with the adapter folded into its offsets: exact, and no code changes.

    W~ + s B A repeated over groups = scale Q + (offset + s B A). Raises RunError where the adapter is none over groups.
    """
    moved = {}
    for name, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "get_base_layer") and isinstance(layer.get_base_layer(), over):
            codes = layer.get_base_layer().codes
            delta = torch.zeros_like(codes.offset, dtype=torch.float64)
            for adapter in layer.active_adapters:
                down, up = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
                if down.shape[1] != codes.groups:
                    down = contracted(down, codes.groups, by_group(codes.group_index))
                delta += layer.scaling[adapter] * (up @ down)
            moved[name] = codes.shifted(delta.detach())
    base = adapted.unload()
    for name, codes in moved.items():
        base.get_submodule(name).codes = codes
    return base
