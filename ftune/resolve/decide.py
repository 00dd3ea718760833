"""Settle every `auto` and every default that depends on something else: the only file that chooses.

Each choice is a Decision with its reason; the user sees it before the run and finds it in `run.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftune import plugin
from ftune.machine import Machine
from ftune.options import Options
from ftune.places import locate, model_folder
from ftune.recipe import Loaded
from ftune.recipe import source as sources
from ftune.recipe.schema import Chosen, Recipe, listed
from ftune.resolve import adapters
from ftune.resolve.spec import Decision

_MOST_PROCESSES = 16
"""More than so many wait for the one that reads the file."""


def decide(loaded: Loaded, machine: Machine) -> tuple[Recipe, tuple[Decision, ...]]:
    """Return the recipe without any `auto`, and why each value is what it is."""
    recipe = loaded.recipe
    found: list[Decision] = []
    for chooser in _CHOOSERS:
        chosen = list(chooser(loaded, recipe, machine))
        recipe = _with(recipe, chosen)
        found.extend(chosen)
    return recipe, tuple(found)


def _with(recipe: Recipe, decisions: list[Decision]) -> Recipe:
    for decision in decisions:
        section, key = decision.key.split(".")
        before = getattr(recipe, section)
        options = before.options if isinstance(before, Chosen) else before
        changed = type(options)(**{**options.model_dump(), key: decision.value})
        recipe = replace(recipe, **{section: replace(before, options=changed) if options is not before else changed})
    return recipe


def _paths(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    for key in ("train", "eval"):
        value = getattr(recipe.data, key)
        names = [source.path for source in listed(value)]
        found = [str(locate(name, loaded.directory) or name) for name in names]
        if found != names:
            where = "found beside the recipe" if _beside(loaded, names) else "found from here"
            yield Decision(f"data.{key}", _moved(value, found), where)
    if recipe.data.chat_template is not None:
        template = locate(recipe.data.chat_template, loaded.directory)
        if template is not None:
            yield Decision("data.chat_template", str(template), "the file of that name")
    model = locate(recipe.model.model_name_or_path, loaded.directory)
    if model is not None and model.is_dir() and str(model) != recipe.model.model_name_or_path:
        yield Decision("model.model_name_or_path", str(model), "a directory of that name is here")


def _moved(value: Any, paths: list[str]) -> Any:
    """Return `data.train` or `data.eval` with other paths, in the shape in which it was written."""
    if not isinstance(value, list):
        return paths[0]
    moved = zip(value, paths, strict=True)
    return [path if isinstance(item, str) else {**item.model_dump(), "path": path} for item, path in moved]


def _beside(loaded: Loaded, names: list[str]) -> bool:
    return any((loaded.directory / name).exists() and not Path(name).exists() for name in names)


def _model_files(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    given = loaded.source.overridden
    replaced = "model.model_name_or_path" in given and "model.gguf_file" not in given
    if recipe.model.gguf_file is None or not replaced:
        return
    before = sources.parse(loaded.source.file, loaded.source.text).data.get("model")
    named = before.get("model_name_or_path") if isinstance(before, dict) else None
    folder = model_folder(recipe.model.model_name_or_path)
    if loaded.recipe.model.model_name_or_path != named and not (
        folder is not None and (folder / recipe.model.gguf_file).is_file()
    ):
        yield Decision("model.gguf_file", None, "it belongs to the model that --set replaced")


def _precision(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    training = recipe.training
    capability = _capability(machine)
    # All devices compute the same way, so the oldest one has the say.
    device = min(machine.gpus, key=lambda gpu: gpu.capability).name if machine.gpus else "this CPU"
    bf16, fp16 = training.bf16, training.fp16
    pure = recipe.model.dtype == "bfloat16" and not plugin.tuning(recipe.tuning.method).frozen_base
    half = recipe.model.dtype == "float16"
    if bf16 == "auto":
        if fp16 is True:
            bf16, why = False, "fp16 is on"
        elif half:
            bf16, why = False, "the weights are float16"
        elif pure:
            bf16, why = False, "the weights are bfloat16 already: there is nothing to cast"
        elif machine.computes_bfloat16():
            bf16, why = True, f"{device} computes bfloat16 in hardware"
        else:
            bf16, why = False, f"{device} has no bfloat16 instructions"
        yield Decision("training.bf16", bf16, why)
    if fp16 == "auto":
        fp16 = bool(machine.gpus) and not bf16 and not pure and (half or capability < (8, 0))
        reason = "the weights are float16" if half else f"{device} is older than bfloat16"
        why = reason if fp16 else "bf16 is on" if bf16 else "nothing asks for it"
        yield Decision("training.fp16", fp16, why)
    if training.tf32 == "auto":
        tf32 = capability >= (8, 0)
        yield Decision("training.tf32", tf32, "Ampere and newer GPUs have it" if tf32 else "this machine has none")


def _capability(machine: Machine) -> tuple[int, int]:
    return min((gpu.capability for gpu in machine.gpus), default=(0, 0))


def _dtype(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    if recipe.model.dtype != "auto":
        return
    tuning = plugin.tuning(recipe.tuning.method)
    if tuning.takes_from_base(recipe.tuning.options):
        why = "what the adapter starts with is taken out of the weights, and 16 bits would round the rest"
        yield Decision("model.dtype", "float32", why)
    elif tuning.frozen_base and recipe.training.bf16:
        yield Decision("model.dtype", "bfloat16", "frozen weights need no float32 copy; what is trained stays float32")
    elif tuning.frozen_base and recipe.training.fp16:
        yield Decision("model.dtype", "float16", "frozen weights need no float32 copy; what is trained stays float32")
    elif tuning.copies_in_float32(recipe.tuning.options) and recipe.training.bf16:
        yield Decision("model.dtype", "bfloat16", "what moves has float32 copies, so that no small update is lost")
    else:
        why = "trained weights keep small updates in float32" if not tuning.frozen_base else "what is computed in"
        yield Decision("model.dtype", "float32", why)


def _adapter(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    options = recipe.tuning.options
    if getattr(options, "bnb_4bit_compute_dtype", None) == "auto":
        training = recipe.training
        computed = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
        why = "what the rest of the model computes in"
        why += "; where it overflows, float32 is slower and safe" if computed == "float16" else ""
        yield Decision("tuning.bnb_4bit_compute_dtype", computed, why)
    if (name := getattr(options, "adapter", None)) is None:
        return
    folder = locate(name, loaded.directory)
    if folder is not None:
        yield Decision("tuning.adapter", str(folder), "the folder of that name")
    given = loaded.source.data.get("tuning", {})
    for key, value in adapters.made_with(folder, type(options).model_fields).items():
        if key not in given and _takes(options, key, value):
            yield Decision(f"tuning.{key}", value, "the adapter was made with it")


def _takes(options: Options, key: str, value: Any) -> bool:
    """Return whether an option can have a value: adapters made elsewhere may know more than a recipe can say."""
    from pydantic import ValidationError

    try:
        type(options)(**{**options.model_dump(), key: value})
    except ValidationError:
        return False
    return True


def _attention(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    if recipe.model.attn_implementation != "auto":
        return
    half = recipe.training.bf16 or recipe.training.fp16 or recipe.model.dtype != "float32"
    if _capability(machine) >= (8, 0) and half and machine.has("flash_attn"):
        yield Decision("model.attn_implementation", "flash_attention_2", "flash-attn is installed and fastest here")
    else:
        why = "PyTorch's own fused attention" + ("; pip install flash-attn may be faster" if machine.gpus else "")
        yield Decision("model.attn_implementation", "sdpa", why)


def _optimizer(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    optimizer = plugin.optimizer(recipe.optimizer.method)
    tuning = plugin.tuning(recipe.tuning.method)
    if recipe.training.learning_rate == "auto":
        yield Decision("training.learning_rate", *plugin.customary_learning_rate(optimizer, tuning))
    if recipe.training.max_grad_norm == "auto":
        limit, why = optimizer.default_max_grad_norm, optimizer.max_grad_norm_reason
        if optimizer.clips_itself(recipe.optimizer.options):
            limit, why = 0.0, "optim_args limits gradients already"
        yield Decision("training.max_grad_norm", limit, why)


def _rows(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    training = recipe.training
    if training.per_device_train_batch_size == "auto":
        whole = training.rows_at_once * training.gradient_accumulation_steps
        why = f"the plan decides: as many of the {whole} rows of a step as fit at once, and accumulation for the others"
        yield Decision("training.per_device_train_batch_size", "auto", why)


def _evaluation(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    training = recipe.training
    if training.eval_strategy == "auto":
        if recipe.data.eval is None:
            yield Decision("training.eval_strategy", "no", "there are no evaluation rows")
        elif training.eval_steps is not None:
            yield Decision("training.eval_strategy", "steps", "eval_steps is set")
        else:
            yield Decision("training.eval_strategy", "epoch", "there are evaluation rows")


def _loader(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    if recipe.data.num_proc == "auto":
        count = max(1, min(machine.cpu_cores, _MOST_PROCESSES))
        yield Decision("data.num_proc", count, "a process for each core")
    if recipe.training.dataloader_pin_memory == "auto":
        pin = bool(machine.gpus)
        why = "pinned batches copy to the GPU in the background" if pin else "there is no GPU to copy to"
        yield Decision("training.dataloader_pin_memory", pin, why)


_ENGINES = (
    "whole replicas: nothing is split over devices",
    "whole replicas, which share the optimizer's work and state",
    "FSDP2 splits gradients and state; weights are gathered from forward to backward",
    "FSDP2 splits weights, gradients and state; a layer's weights are gathered while it runs",
)
"""Why a ZeRO stage is carried by what carries it."""


def _engine(loaded: Loaded, recipe: Recipe, machine: Machine) -> Iterator[Decision]:
    if recipe.distributed.engine == "auto":
        why = _ENGINES[recipe.distributed.zero_stage]
        yield Decision("distributed.engine", "fsdp" if recipe.distributed.splits_weights else "ddp", why)


_CHOOSERS = (
    *(_paths, _model_files, _precision, _dtype, _adapter, _attention, _optimizer),
    *(_rows, _evaluation, _loader, _engine),
)
"""In this order: each sees what those before it chose."""


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as `section.key: value`, for comparing two runs."""
    return {f"{section}.{key}": value for section, values in recipe.as_dict().items() for key, value in values.items()}
