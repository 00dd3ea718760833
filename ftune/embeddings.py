"""A model's embeddings and output layer, which some optimizers treat apart from the matrices between them."""

from __future__ import annotations

from typing import Any


def embedding_weights(model: Any) -> list[Any]:
    """Return the weights of a model's embedding layers; none where no model is given."""
    if model is None:
        return []
    import torch

    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]


def end_weights(model: Any) -> list[Any]:
    """Return the weights of a model's embedding layers and of its output layer, which may be one and the same."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(output, "weight", None)
    return [*embedding_weights(model), *([] if weight is None else [weight])]


def of_model(weight: Any) -> Any:
    """Return the model's weight for which a copy stands that an optimizer moves; else the weight itself."""
    return getattr(weight, "copy_of", weight)


def split_hidden(groups: list[dict[str, Any]], model: Any) -> list[dict[str, Any]]:
    """Return parameter groups in two parts each: `hidden` matrices, and embeddings, output layer and vectors.

    Without a model every matrix counts as hidden.
    """
    ends = {id(weight) for weight in end_weights(model)}

    def is_hidden(weight: Any) -> bool:
        return weight.ndim == 2 and id(of_model(weight)) not in ends

    split = []
    for group in groups:
        for hidden in (True, False):
            chosen = [weight for weight in group["params"] if is_hidden(weight) is hidden]
            if chosen:
                split.append({**group, "params": chosen, "hidden": hidden})
    return split


def keep_in_32_bits(optimizer: Any, weights: list[Any]) -> Any:
    """Return a bitsandbytes optimizer that keeps the state of some weights in 32 bits.

    An embedding's gradient is zero but for the rows of a batch, so that one large row spoils the scale of its block
    (Dettmers et al., 2021, section 2.3). bitsandbytes' own manager of exceptions is one for the whole process and
    remembers weights by address and place: a second run in it would take over the first one's. So each has its own.
    """
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.__new__(GlobalOptimManager)
    manager.initialize()
    wanted = {id(weight) for weight in weights}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if id(of_model(weight)) in wanted:
                manager.override_config(weight, "optim_bits", 32)
    manager.register_parameters(optimizer.param_groups)
    optimizer.mng = manager
    return optimizer
