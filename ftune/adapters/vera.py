"""VeRA (Kopiczko et al., 2023) through PEFT."""

from __future__ import annotations

from typing import Any

from ftune.adapters.continued import continued
from ftune.adapters.lora import in_float32, wrapped
from ftune.adapters.options import VeRAOptions
from ftune.adapters.targets import check_names, spelled_out


def add_vera(model: Any, options: VeRAOptions) -> Any:
    """Return a PEFT model in which only VeRA's vectors are trained; raises RecipeError for layers that are none."""
    from peft import TaskType, VeraConfig

    model.requires_grad_(False)
    if options.adapter is not None:
        return in_float32(continued(model, options.adapter, "VERA"))
    check_names(model, options)
    config = VeraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.r,
        d_initial=options.d_initial,
        vera_dropout=options.vera_dropout,
        projection_prng_key=options.projection_prng_key,
        target_modules=spelled_out(model, options),
        layers_to_transform=options.layers_to_transform,
        layers_pattern=options.layers_pattern,
        modules_to_save=options.modules_to_save,
    )
    return in_float32(wrapped(model, config, options))
