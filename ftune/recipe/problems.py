"""What is wrong with a recipe's shape, in the words of the person who wrote it.

Turns unknown keys and pydantic's errors into problems with a place, a caret and the nearest key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from ftune import plugin
from ftune.errors import Problem
from ftune.recipe.schema import PLUGIN_SECTIONS, SECTIONS
from ftune.recipe.source import KeyPath, Source

RENAMED = {
    "warmup_ratio": "`warmup_ratio` is now `warmup_steps` with a fraction: warmup_steps: 0.03",
    "evaluation_strategy": "`evaluation_strategy` is now `eval_strategy`",
    "per_gpu_train_batch_size": "`per_gpu_train_batch_size` is now `per_device_train_batch_size`",
    "per_gpu_eval_batch_size": "`per_gpu_eval_batch_size` is now `per_device_eval_batch_size`",
    "torch_dtype": "`torch_dtype` is now `dtype`",
    "activation_checkpointing": "ftune keeps the name `gradient_checkpointing`",
    "activation_checkpointing_kwargs": "ftune always checkpoints non-reentrantly; remove this key",
    "gradient_checkpointing_kwargs": "ftune always checkpoints non-reentrantly; remove this key",
    "max_seq_length": "`max_seq_length` is now `data.max_length`",
    "max_seq_len": "this is `data.max_length`",
    "cutoff_len": "this is `data.max_length`",
    "sequence_len": "this is `data.max_length`",
    "micro_batch_size": "this is `training.per_device_train_batch_size`",
    "batch_size": "this is `training.per_device_train_batch_size`",
    "num_epochs": "this is `training.num_train_epochs`",
    "epochs": "this is `training.num_train_epochs`",
    "optimizer": "this is `training.optim`",
    "lr": "this is `training.learning_rate`",
    "lr_scheduler": "this is `training.lr_scheduler_type`",
    "lora_r": "this is `r`",
    "lora_rank": "this is `r`",
    "rank": "this is `r`",
    "lora_target_modules": "this is `target_modules`",
    "base_model": "this is `model.model_name_or_path`",
    "dataset": "this is `data.train`",
    "datasets": "this is `data.train`",
    "train_file": "this is `data.train`",
    "sample_packing": "this is `data.packing`",
    "flash_attention": "this is `model.attn_implementation: flash_attention_2`",
    "overwrite_output_dir": "ftune never overwrites a run: choose a new `output_dir`, or `ftune resume` the old one",
    "no_cuda": "ftune uses the GPU when there is one; hide it with CUDA_VISIBLE_DEVICES=",
    "use_cpu": "ftune uses the GPU when there is one; hide it with CUDA_VISIBLE_DEVICES=",
    "deepspeed": "this is `distributed: {zero_stage: …}`",
    "fsdp": "this is `distributed: {engine: fsdp}`",
    "adam_beta1": "this is `optim_args: {betas: [0.9, 0.999]}`",
    "adam_beta2": "this is `optim_args: {betas: [0.9, 0.999]}`",
    "adam_epsilon": "this is `optim_args: {eps: 1e-8}`",
    "load_in_4bit": "this is `tuning: {method: qlora}`",
    "load_in_8bit": "this is `tuning: {method: qlora}`",
    "do_train": "remove it: `ftune train` trains",
    "do_eval": "remove it: rows in `data.eval` are evaluated",
    "group_by_length": "length grouping is not offered; `data.packing: true` avoids padding",
}
"""Keys of Hugging Face and its neighbours that go by another name here."""

_ARTICLES = {"list": "a list", "dict": "a mapping", "str": "text", "bool": "a truth value", "NoneType": "nothing"}


def unknown_section(source: Source, name: str) -> Problem:
    """Return the problem of a top-level key that is no section."""
    owners = owners_of(name)
    near = difflib.get_close_matches(name, SECTIONS, n=1)
    if owners:
        label = f"`{name}` is a key of `{owners[0]}`"
        fix = f"put it below `{owners[0]}:`"
    elif name in RENAMED:
        label, fix = RENAMED[name], "see `ftune explain` for the sections and their keys"
    else:
        label = f"did you mean `{near[0]}`?" if near else ""
        fix = "the sections are " + ", ".join(SECTIONS)
    return Problem("unknown-key", f"unknown section `{name}`", source.key((name,)), label, fix=fix)


def unknown_key(source: Source, path: KeyPath, known: Iterable[str], owner: str) -> Problem:
    """Return the problem of a key that its section (or plugin, named by `owner`) does not have."""
    name = str(path[-1])
    section = str(path[0])
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    elsewhere = [found for found in owners_of(name) if found != section]
    fix = f"`ftune explain {owner}` lists every key and its default"
    if near and _similar(name, near[0]) > 0.84:
        label = f"did you mean `{near[0]}`?"
    elif name in RENAMED:
        label = RENAMED[name]
    elif elsewhere:
        label = f"`{name}` is a key of `{elsewhere[0]}`; this is `{section}`"
        fix = f"move it below `{elsewhere[0].split()[0]}:`"
    elif near:
        label = f"did you mean `{near[0]}`?"
    else:
        other = _other_section_near(name, section)
        label = f"did you mean `{other}`?" if other else ""
        if not known:
            fix = f"`{owner}` has no options"
    where = f"`{owner}`" if owner == section else f"`{owner}` ({section})"
    return Problem("unknown-key", f"unknown key `{name}` in {where}", source.key(path), label, fix=fix)


def missing_key(source: Source, section: str, key: str, example: str) -> Problem:
    """Return the problem of a required key that is not there."""
    return Problem(
        "missing-key",
        f"`{section}.{key}` is missing",
        source.key((section,)),
        f"needs `{key}`" if section in source.data else "",
        fix=f"add `{key}: {example}` below `{section}:`",
    )


def bad_value(source: Source, path: KeyPath, errors: list[dict[str, Any]]) -> Problem:
    """Return the problem of a value that pydantic refused, one error for each type it could have been."""
    value = errors[0].get("input")
    name = ".".join(str(part) for part in path)
    expectations = [_expectation(error, value) for error in errors]
    bounds = [text for text, _ in expectations if text.startswith("must be")]
    expected = bounds[0] if bounds else " or ".join(dict.fromkeys(text for text, _ in expectations))
    expected = expected.replace(" or expected ", " or ")
    label = next((guess for _, guess in expectations if guess), "")
    return Problem(
        "bad-value",
        f"`{name}` cannot be {_shown(value)}",
        source.value(path),
        label or expected,
        why=expected if label else "",
        fix=f"`ftune explain {path[-1] if isinstance(path[-1], str) else path[-2]}` says what it takes",
    )


def owners_of(key: str) -> list[str]:
    """Return the sections that have this key (`tuning` with its method where it is a plugin's)."""
    found = [name for name, model in SECTIONS.items() if model is not None and key in model.model_fields]
    for section, (package, _) in PLUGIN_SECTIONS.items():
        methods = [name for name in plugin.names(package) if key in plugin.get(package, name).Options.model_fields]
        if methods:
            found.append(f"{section} (method: {methods[0]})")
    holders = [name for name in plugin.names("optimizers") if key in plugin.optimizer(name).Options.model_fields]
    if holders:
        found.append(f"training.optim_args (of {', '.join(holders[:3])})")
    return found


def _other_section_near(name: str, section: str) -> str:
    for other, model in SECTIONS.items():
        near = difflib.get_close_matches(name, model.model_fields if model else (), n=1, cutoff=0.8)
        if near and other != section:
            return f"{other}.{near[0]}"
    return ""


def _similar(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (int, float)):
        return f"`{value}`"
    if isinstance(value, str):
        return f'the text "{value if len(value) <= 60 else value[:57] + "..."}"'
    return _ARTICLES.get(type(value).__name__, type(value).__name__)


def _expectation(error: dict[str, Any], value: Any) -> tuple[str, str]:
    """Return what would be right, and a guess at what was meant."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(value), choices, n=1)
        return "one of " + ", ".join(choices), f"did you mean `{near[0]}`?" if near else ""
    if kind.startswith("flag") and isinstance(value, str) and value.lower() in {"yes", "on", "no", "off", "y", "n"}:
        meant = "true" if value.lower() in {"yes", "on", "y"} else "false"
        return str(error["msg"]), f"write `{meant}`: in YAML 1.2 `{value}` is text"
    bounds = {
        "greater_than": ("gt", "greater than {}"),
        "greater_than_equal": ("ge", "{} or more"),
        "less_than": ("lt", "less than {}"),
        "less_than_equal": ("le", "{} or less"),
    }
    if kind in bounds:
        key, words = bounds[kind]
        return "must be " + words.format(context[key]), ""
    types = {"string_type": "expected text", "dict_type": "expected a mapping", "list_type": "expected a list", "bool_type": "expected true or false"}
    return types.get(kind, str(error["msg"])), ""
