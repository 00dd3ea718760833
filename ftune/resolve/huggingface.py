"""The only file that knows how Hugging Face's TrainingArguments spell a recipe.

Upstream renames keys between versions; recipe keys stay. A test constructs the installed class from every recipe.
"""

from __future__ import annotations

from typing import Any

from ftune.recipe.schema import Recipe

_SAME = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "neftune_noise_alpha",
    "torch_compile",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "seed",
    "logging_steps",
    "eval_strategy",
    "save_strategy",
    "run_name",
)


def training_arguments(recipe: Recipe, *, device_type: str) -> dict[str, Any]:
    """Return keyword arguments of `transformers.TrainingArguments` for a recipe without `auto`."""
    training = recipe.training
    arguments = {key: getattr(training, key) for key in _SAME}
    arguments |= {
        "warmup_steps": _steps(training.warmup_steps),
        "eval_steps": None if training.eval_steps is None else _steps(training.eval_steps),
        "save_steps": _steps(training.save_steps),
        "report_to": training.trackers,
        "use_cpu": device_type == "cpu",
        # None leaves the process's setting alone; Hugging Face raises on a CPU for any other value.
        "tf32": training.tf32 if device_type == "cuda" else None,
        "activation_checkpointing": training.gradient_checkpointing,
        # Reentrant checkpointing recomputes inside backward: wrong gradients where weights change meanwhile.
        "activation_checkpointing_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
        # A NaN loss would otherwise be logged as the average of the others, which is 0.0 for the first.
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "average_tokens_across_devices": True,
        # Only ftune's own loss reads the columns; dropping them by the model's signature would lose position_ids.
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "save_only_model": False,
        # Each rank reads the stream itself and takes its share; sent from the first one, unequal batches cannot be cut.
        "accelerator_config": {"dispatch_batches": False},
        # Every trained weight takes part in every step; looking for others costs a pass over the graph.
        "ddp_find_unused_parameters": False,
        # No buffer changes while training, and those of quantised layers are the model itself.
        "ddp_broadcast_buffers": False,
    }
    if training.eval_strategy == "no":
        arguments["metric_for_best_model"] = None
    return arguments


def _steps(value: float) -> float | int:
    """Fractions stay fractions; whole numbers become the integers that Hugging Face insists on."""
    return value if value < 1 else int(value)
