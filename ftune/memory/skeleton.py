"""The model of a recipe as training has it, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ftune import plugin
from ftune.adapters.bits import keep_differentiable
from ftune.memory.numberless import as_fake, numberless
from ftune.models.quiet import quiet
from ftune.recipe.schema import Recipe


def skeleton(recipe: Recipe, config: Any, fake: FakeTensorMode) -> Any:
    """Return the model that `config` describes, tuned as the recipe says, on fake tensors."""
    tuning, options = plugin.tuning(recipe.tuning.method), recipe.tuning.options
    model = on_meta(recipe, config)
    quantization = tuning.quantization(options)
    if quantization is not None:
        from ftune.memory.bits import quantise

        quantise(model, quantization)
    keep_differentiable(model)
    with quiet():
        model = tuning.without_numbers(model, options)
    if quantization is not None:
        from ftune.memory.bits import pack

        with numberless(fake), torch.no_grad():
            pack(model)
    as_fake(model, fake)
    return model


def on_meta(recipe: Recipe, config: Any) -> Any:
    """Return the model with shapes and dtypes only."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    model = recipe.model
    dtype = getattr(config, "dtype", None) if model.dtype == "auto" else getattr(torch, model.dtype)
    more: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation != "auto":
        more["attn_implementation"] = model.attn_implementation
    with quiet(), no_init_weights(), torch.device("meta"):
        try:
            made = AutoModelForCausalLM.from_config(config, **more)
        except ValueError as error:
            if model.attn_implementation != "sdpa" or "attention" not in str(error):
                raise
            # What a run falls back to, where an architecture has no fused attention.
            made = AutoModelForCausalLM.from_config(config, **{**more, "attn_implementation": "eager"})
    made.tie_weights()
    return made


def config_from(values: Mapping[str, Any], *, layers: int | None = None) -> Any:
    """Return a config.json as transformers reads it, of another number of layers where one is given."""
    from transformers import AutoConfig

    kind = str(values["model_type"])
    config = AutoConfig.for_model(kind, **{key: value for key, value in values.items() if key != "model_type"})
    if layers is not None:
        text = config.get_text_config()
        for key, value in list(vars(text).items()):
            if isinstance(value, (list, tuple)) and len(value) == text.num_hidden_layers:
                setattr(text, key, type(value)(value[:layers]))
        text.num_hidden_layers = layers
    return config
