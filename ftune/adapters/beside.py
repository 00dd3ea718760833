"""An adapter in a model whose own weights are trained too: which weights are its, and how it goes into them."""

from __future__ import annotations

from typing import Any

from ftune.adapters.lora import add_lora
from ftune.adapters.options import LoRAOptions
from ftune.errors import Problem, RecipeError
from ftune.plugin import Batches


def add_beside(model: Any, options: LoRAOptions, *, batches: Batches) -> Any:
    """Return the model itself with an adapter in its layers and every weight trained.

    It stays the transformers model, and not PEFT's model around it, so that a checkpoint holds all weights. Raises
    RecipeError for layers that are none, and for one that shares its weight with another: the sum would be in both.
    """
    _require_foldable(options)
    adapted = add_lora(model, options, batches=batches).get_base_model()
    _require_own_weights(adapted)
    adapted.requires_grad_(True)
    return adapted


def adapter_weights(model: Any) -> list[Any]:
    """Return the weights that stand beside those of the layers they are added to."""
    found: dict[int, Any] = {}
    for layer in _adapted_layers(model).values():
        base = {id(weight) for weight in layer.get_base_layer().parameters()}
        found |= {id(weight): weight for weight in layer.parameters() if id(weight) not in base}
    return list(found.values())


def fold(model: Any) -> Any:
    """Add the adapter to the weights beside it, and take it out of the model.

    The adapter is float32, so that sums are too; weights of 16 bits are rounded once.
    """
    for name, layer in _adapted_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model


def _adapted_layers(model: Any) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _require_foldable(options: LoRAOptions) -> None:
    for key in ("adapter", "modules_to_save", "trainable_token_indices"):
        if getattr(options, key) is not None:
            what = f"tuning.{key} has no meaning where every weight is trained"
            why = "the adapter begins at zero and goes into the weights beside it at the end"
            raise RecipeError(Problem("lora-options", what, why=why, fix=f"remove tuning.{key}"))


def _require_own_weights(model: Any) -> None:
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            places.setdefault(id(weight), []).append(name)
    for name, layer in _adapted_layers(model).items():
        shared = places[id(layer.get_base_layer().weight)]
        if len(shared) > 1:
            short = name.rpartition(".")[2]
            what = f"an adapter on `{short}` could not be folded in"
            why = f"its weight is also that of {' and '.join(place for place in shared if not place.startswith(name))}"
            fix = f"leave `{short}` out of tuning.target_modules; its weight is trained in full"
            raise RecipeError(Problem("shared-weight", what, why=why, fix=fix))
