"""Bytes that a run takes in any case: weights, gradients and optimizer state, told without a trace.

What is told is never more than what a trace finds, so that a recipe which is too large by it need not be traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftune import plugin
from ftune.plugin import Gradients
from ftune.recipe.schema import Recipe

_FEWEST_BITS = 2
"""Of the codes that ftune makes itself; larger ones are not told apart here."""


class Bounds:
    """Bounds of recipes that differ in what is trained, and how, upon one model."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._models: dict[str, tuple[Any, list[Any]]] = {}

    def of(self, recipe: Recipe) -> int:
        """Return the least bytes that a step of a decided recipe holds at its end."""
        from ftune.training.state_size import state_bytes_of

        tuning, optimizer = plugin.tuning(recipe.tuning.method), plugin.optimizer(recipe.optimizer.method)
        options = recipe.tuning.options
        if tuning.quantises or tuning.takes_codes:
            bits = _FEWEST_BITS if tuning.takes_codes else 4 if _in_4_bits(tuning.quantization(options)) else 8
            return self._in_few_bits(recipe, bits)
        model, trained = self._tuned(recipe)
        weights: int = sum(tensor.nbytes for tensor in _tensors(model))
        if tuning.rotates:
            return weights  # whose states and gradients may be asleep, on the host or nowhere
        gradients: int = sum(weight.nbytes for weight in trained) if optimizer.gradients is Gradients.KEPT else 0
        state = (
            0.0 if optimizer.pages_state else tuning.state_bytes(model, trained, state_bytes_of(model, recipe), options)
        )
        return weights + gradients + int(state)

    def _tuned(self, recipe: Recipe) -> tuple[Any, list[Any]]:
        """Return the model on `meta` as the recipe tunes it, and the weights that are trained."""
        key = f"{recipe.model.dtype} {recipe.tuning.as_dict()}"
        if key not in self._models:
            from ftune.models.quiet import quiet

            model = self._plain(recipe)
            with quiet():
                model = plugin.tuning(recipe.tuning.method).without_numbers(model, recipe.tuning.options)
            self._models[key] = model, [weight for weight in model.parameters() if weight.requires_grad]
        return self._models[key]

    def _plain(self, recipe: Recipe) -> Any:
        from ftune.memory.skeleton import config_from, on_meta

        return on_meta(recipe, config_from(self._config))

    def _in_few_bits(self, recipe: Recipe, bits: int) -> int:
        """Return the bytes of the base alone, its linear layers in so many bits."""
        from torch import nn

        key = f"{recipe.model.dtype} {bits} bits"
        if key not in self._models:
            self._models[key] = self._plain(recipe), []
        model = self._models[key][0]
        small = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
        sizes = ((tensor.numel() * bits // 8 if id(tensor) in small else tensor.nbytes) for tensor in _tensors(model))
        return sum(sizes)


def _in_4_bits(quantization: Mapping[str, Any] | None) -> bool:
    return bool(quantization and quantization.get("load_in_4bit"))


def _tensors(model: Any) -> list[Any]:
    """Return every tensor of a model once, those that layers share too."""
    found = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return list(found.values())
