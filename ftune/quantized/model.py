"""Which layers of a model are in few bits, and the exchange of the two kinds of layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ftune.errors import Problem, RecipeError
from ftune.quantized.codes import GroupCodes, require_groups
from ftune.quantized.linear import QuantizedLinear


def require_all_groups(layers: Mapping[str, nn.Linear], group_size: int) -> None:
    """Raise RecipeError where a group size divides not the inputs of every layer, naming one that does."""
    for name, layer in layers.items():
        require_groups(layer.in_features, group_size, f"`{name}`", every=[one.in_features for one in layers.values()])


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers that may be quantised by name: all but the output layer, as PEFT's `all-linear`."""
    output = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output
    }


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield the name and the module of each layer in few bits."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def quantise(model: nn.Module, names: Iterable[str], fit: Callable[[torch.Tensor], GroupCodes]) -> None:
    """Put codes in the place of the named dense layers, one by one: each dense weight is freed before the next."""
    for name in names:
        put_codes(model, {name: fit(model.get_submodule(name).weight)})


def codes_of(model: nn.Module) -> dict[str, GroupCodes]:
    """Return the codes of each quantised layer, by the layer's name without the adapters around it."""
    return {name.removesuffix(".base_layer"): module.codes for name, module in quantized_layers(model)}


def dequantised(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the model with dense layers in the place of its codes, one after another."""
    for name, layer in list(quantized_layers(model)):
        model.set_submodule(name, layer.dequantised(dtype))
    return model


def put_codes(model: nn.Module, layers: Mapping[str, GroupCodes]) -> None:
    """Put codes in the place of the named dense layers, whose weights are freed; biases stay.

    Raises RecipeError where a layer is missing or of another shape: the codes are another model's.
    """
    for name, codes in layers.items():
        try:
            dense = model.get_submodule(name)
        except AttributeError:
            dense = None
        if isinstance(dense, QuantizedLinear) and (dense.codes.shape, dense.bits) == (codes.shape, codes.bits):
            dense.codes = codes.to(dense.packed.device)
            continue
        if not isinstance(dense, nn.Linear) or tuple(dense.weight.shape) != codes.shape:
            what = f"the quantised weights do not belong to this model: it has no layer `{name}` of {codes.shape}"
            raise RecipeError(Problem("codes-do-not-fit", what, fix="name the model that they were made of"))
        model.set_submodule(name, QuantizedLinear(codes.to(dense.weight.device), dense.bias))
