"""LoRA (Hu et al., 2021): a small low-rank addition beside frozen weights, through PEFT."""

from __future__ import annotations

from typing import Any

from ftune.adapters.options import LoRAOptions
from ftune.adapters.targets import check_names, refused
from ftune.errors import RecipeError


def add_lora(model: Any, options: LoRAOptions) -> Any:
    """Return a PEFT model in which only the adapter is trained; raises RecipeError for layers that are none."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.target_modules,
        modules_to_save=options.modules_to_save,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        init_lora_weights=options.init_lora_weights,
    )
    check_names(model, options)
    model.requires_grad_(False)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(refused(model, options.target_modules, str(error))) from None
    for weight in adapted.parameters():
        # Copies of whole layers (modules_to_save) come in the base's dtype, where small updates are lost.
        if weight.requires_grad and weight.dtype.itemsize < 4:
            weight.data = weight.data.float()
    return adapted
