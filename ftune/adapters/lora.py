"""LoRA (Hu et al., 2021) and the ways to begin it, through PEFT."""

from __future__ import annotations

import warnings
from typing import Any

from ftune.adapters import eva, loftq, residual
from ftune.adapters.continued import continued
from ftune.adapters.options import AdapterOptions
from ftune.adapters.targets import check_names, refuse_whole_quantised, refused, spelled_out
from ftune.errors import RecipeError
from ftune.plugin import Batches

_OUTSIDE_PEFT = ("eva", "loftq")
"""Starts that are set once the adapter is there."""


def add_lora(model: Any, options: AdapterOptions, *, batches: Batches) -> Any:
    """Return a PEFT model in which only the adapter is trained; raises RecipeError for layers that are none."""
    model.requires_grad_(False)
    if options.adapter is not None:
        return in_float32(continued(model, options.adapter, "LORA"))
    start: Any = getattr(options, "init_lora_weights", True)
    check_names(model, options)
    residual.check(model, start, options)
    adapted = wrapped(model, _config(model, options, start), options)
    if start == "eva":
        eva.start(adapted, batches, options)
    if start == "loftq":
        loftq.start(adapted)
    residual.remember(adapted, start)
    return in_float32(adapted)


def _config(model: Any, options: AdapterOptions, start: Any) -> Any:
    from peft import EvaConfig, LoraConfig, TaskType

    more = {"eva_config": EvaConfig(rho=options.eva_rho, tau=options.eva_tau)} if start == "eva" else {}
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=spelled_out(model, options),
        exclude_modules=options.exclude_modules,
        layers_to_transform=options.layers_to_transform,
        layers_pattern=options.layers_pattern,
        rank_pattern=dict(options.rank_pattern),
        alpha_pattern=dict(options.alpha_pattern),
        modules_to_save=options.modules_to_save,
        trainable_token_indices=options.trainable_token_indices,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        # What LoftQ sets afterwards is an ordinary adapter, which nobody has to begin anew when it is loaded.
        init_lora_weights=True if start == "loftq" else start,
        **more,
    )


def wrapped(model: Any, config: Any, options: Any) -> Any:
    """Return the model with an adapter in it; what PEFT refuses, or passes over with a warning, becomes an error."""
    from peft import get_peft_model

    refuse_whole_quantised(model, options.modules_to_save)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise RecipeError(refused(model, options.target_modules, str(error))) from None
    for warning in said:
        text = str(warning.message)
        if "did not match any targeted module" in text or "no modules were excluded" in text:
            raise RecipeError(refused(model, options.target_modules, text, nothing_matches=True))
    return adapted


def in_float32(adapted: Any) -> Any:
    """Return the model with everything that is trained in float32."""
    for weight in adapted.parameters():
        # Copies of whole layers (modules_to_save) come in the base's dtype, where small updates are lost.
        if weight.requires_grad and weight.dtype.itemsize < 4:
            weight.data = weight.data.float()
    return adapted
