"""What a model is made of, from the bottom up: its embedding, each of its layers, its head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ftune.blocks import blocks_of


@dataclass(frozen=True)
class Unit:
    """Weights that move together."""

    name: str
    weights: tuple[torch.nn.Parameter, ...]


@dataclass(frozen=True)
class Units:
    """All weights of a model, each in exactly one unit; a shared weight is in the lowest."""

    embedding: Unit
    layers: tuple[Unit, ...]
    head: Unit

    @property
    def in_order(self) -> tuple[Unit, ...]:
        """From the bottom up."""
        return (self.embedding, *self.layers, self.head)


def units_of(model: Any) -> Units:
    """Return a model's units; raise RecipeError where it has no list of layers.

    The layers are the largest list of modules. The embedding is what embeds tokens and whatever the model lists before
    its layers, position embeddings among it; the head is the rest: the final norm, and an output layer of its own.
    OPT lists its final norm before its layers, which so moves with the embedding.
    """
    layers = blocks_of(model)
    in_layers = {id(weight) for layer in layers for weight in layer.parameters()}
    below, above, passed = _weights_of(model, "get_input_embeddings"), [], False
    output = {id(weight) for weight in _weights_of(model, "get_output_embeddings")}
    for weight in model.parameters():
        if id(weight) in in_layers:
            passed = True
        elif passed or id(weight) in output:
            above.append(weight)
        else:
            below.append(weight)
    taken: set[int] = set()
    return Units(
        _unit("embedding", below, taken),
        tuple(_unit(f"layer {number}", layer.parameters(), taken) for number, layer in enumerate(layers)),
        _unit("head", above, taken),
    )


def trained_units(units: Iterable[Unit], trained: Iterable[Any]) -> list[Unit]:
    """Return those of the units that hold a trained weight."""
    known = {id(weight) for weight in trained}
    return [unit for unit in units if any(id(weight) in known for weight in unit.weights)]


def _unit(name: str, weights: Iterable[torch.nn.Parameter], taken: set[int]) -> Unit:
    own = []
    for weight in weights:
        if id(weight) not in taken:
            taken.add(id(weight))
            own.append(weight)
    return Unit(name, tuple(own))


def _weights_of(model: Any, getter: str) -> list[torch.nn.Parameter]:
    """Return the weights of the module that a transformers model names, if it names one."""
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return []
    return list(module.parameters()) if isinstance(module, torch.nn.Module) else []
