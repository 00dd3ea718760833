"""How many bytes of optimizer state a weight has, by what the optimizer says of itself."""

from __future__ import annotations

from typing import Any

from ftune import plugin
from ftune.embeddings import embedding_weights, end_weights
from ftune.recipe.schema import Recipe


def state_bytes_of(model: Any, recipe: Recipe) -> plugin.StateBytes:
    """Return the function that says the bytes of state of a weight of this model, moved in so many bytes an element."""
    tuning, optimizer = plugin.tuning(recipe.tuning.method), plugin.optimizer(recipe.optimizer.method)
    ends = {id(weight) for weight in end_weights(model)}
    embeddings = {id(weight) for weight in embedding_weights(model)}
    beside = {id(weight) for weight in tuning.adapter_weights(model)}

    def of(weight: Any, element_bytes: int) -> float:
        tensor = plugin.TrainedTensor(
            tuple(weight.shape),
            element_bytes,
            hidden=id(weight) not in ends,
            embedding=id(weight) in embeddings,
            adapter=id(weight) in beside,
        )
        return optimizer.state_bytes(tensor, recipe.optimizer.options)

    return of
