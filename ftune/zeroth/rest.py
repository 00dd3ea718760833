"""The weights that never move in few bits, beside the few that do in the model's own dtype (Guo et al., 2024).

Their layout is SqueezeLLM's dense and sparse (Kim et al., 2023): the entries that move are taken out of the matrix
before it is given codes, so that they do not stretch its groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ftune.errors import Problem, RecipeError
from ftune.quantized.codes import GroupCodes
from ftune.quantized.minmax import fit_minmax


@dataclass(frozen=True)
class Rest:
    """How the weights that never move are held."""

    bits: int
    group_size: int
    """So many inputs of an output share a scale and an offset."""

    def codes(self, weight: torch.Tensor, places: torch.Tensor) -> GroupCodes:
        """Return a matrix (out, in) in few bits, without its entries at flat `places`: zeros stand there."""
        dense = weight.detach().clone()
        dense.view(-1)[places.long()] = 0
        return fit_minmax(dense, self.bits, self.group_size)

    def state(self, codes: GroupCodes) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps of a layer's codes."""
        return {"packed": codes.packed, "scale": codes.scale, "offset": codes.offset}

    def codes_of(self, state: dict[str, torch.Tensor], linear: torch.nn.Linear) -> GroupCodes:
        """Return a layer's codes from a checkpoint."""
        return GroupCodes(**state, bits=self.bits, in_features=linear.in_features).to(linear.weight.device)


class DenseAndSparse(torch.nn.Module):
    """A linear layer of codes and of entries that move; what it saves and loads is the plain weight (out, in)."""

    def __init__(self, linear: torch.nn.Linear, places: torch.Tensor, codes: GroupCodes) -> None:
        """Take over a linear layer: its parameter holds from now on the entries at `places` alone."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.places, self.codes = places, codes
        self.weight.data = self.weight.data.view(-1)[places.long()]
        self.train(linear.training)

    def dense(self) -> torch.Tensor:
        """Return the whole weight (out, in)."""
        return assembled(self.codes, self.places, self.weight.data)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.linear(inputs, self.dense(), self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # On the host: the whole weights of all layers may not fit where the codes do.
        destination[prefix + "weight"] = self.dense().cpu()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        name = prefix + "weight"
        if name in state_dict:
            dense = state_dict[name].to(self.weight.device)
            state_dict = {**state_dict, name: dense.reshape(-1)[self.places.long()]}
        super()._load_from_state_dict(state_dict, prefix, *more)


def assembled(codes: GroupCodes, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the weight (out, in) whose entries at flat `places` are `values`, in the dtype of these."""
    dense = codes.dequantise(values.dtype)
    dense.view(-1)[places.long()] = values
    return dense


def layers_to_quantise(
    model: torch.nn.Module, weights: list[torch.nn.Parameter], rest: Rest
) -> Iterator[tuple[int, str, torch.nn.Linear]]:
    """Yield the number of a weight, and the name and module of the linear layer that alone owns it.

    The output layer and tied weights stay as they are. Raises RecipeError where a layer's inputs do not divide into
    groups, or no layer is left.
    """
    numbers = {id(weight): number for number, weight in enumerate(weights)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    owners: dict[int, int] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    found = [
        (numbers[id(module.weight)], name, module)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and module is not output
        and id(module.weight) in numbers
        and owners[id(module.weight)] == 1
    ]
    if not found:
        what = "rest_bits: there is no linear layer whose weights the run trains"
        fix = "leave rest_bits out, or train the weights themselves: tuning.method: full"
        raise RecipeError(Problem("zeroth-order-rest", what, fix=fix))
    for _, name, module in found:
        if module.in_features % rest.group_size:
            what = f"rest_group_size {rest.group_size} does not divide the {module.in_features} inputs of `{name}`"
            fits = [size for size in (128, 96, 64, 48, 32, 16, 8) if module.in_features % size == 0]
            fix = f"set rest_group_size to {' or '.join(map(str, fits[:3]))}" if fits else "leave rest_bits out"
            raise RecipeError(Problem("zeroth-order-rest", what, fix=fix))
    yield from found
