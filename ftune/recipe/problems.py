"""What is wrong with a recipe's shape, in the words of the person who wrote it.

Turns unknown keys and pydantic's errors into problems with a place, a caret and the nearest key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from ftune import plugin
from ftune.errors import Problem
from ftune.options import Options
from ftune.recipe.schedules import SCHEDULES
from ftune.recipe.schema import PLUGIN_SECTIONS, SECTIONS
from ftune.recipe.source import KeyPath, Source, written

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
    "deepspeed": "this version does not split a model over devices; remove it",
    "fsdp": "this version does not split a model over devices; remove it",
    "adam_beta1": "this is `optim_args: {betas: [0.9, 0.999]}`",
    "adam_beta2": "this is `optim_args: {betas: [0.9, 0.999]}`",
    "adam_epsilon": "this is `optim_args: {eps: 1e-8}`",
    "do_train": "remove it: `ftune train` trains",
    "do_eval": "remove it: rows in `data.eval` are evaluated",
    "<<": "YAML 1.2 has no merge keys: write the keys out, or put an alias (`*name`) after one key",
}
"""Keys of Hugging Face and its neighbours that go by another name here."""

_ARTICLES = {"list": "a list", "dict": "a mapping", "str": "text", "bool": "a truth value", "NoneType": "nothing"}


@dataclass(frozen=True)
class _Owner:
    """Keys that stand together: a section's, or those of one method in it."""

    place: str
    """What they stand below: `training`, `tuning`, `training.optim_args`."""
    method: str | None
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return f"`{self.place}`" if self.method is None else f"`{self.place}` (of {self.method})"


@cache
def _owners() -> tuple[_Owner, ...]:
    found = [_Owner(name, None, tuple(model.model_fields)) for name, model in SECTIONS.items() if model is not None]
    for section, (package, _) in PLUGIN_SECTIONS.items():
        found += [_owner(section, name, plugin.get(package, name).Options) for name in plugin.names(package)]
    found += [
        _owner("training.optim_args", name, plugin.optimizer(name).Options) for name in plugin.names(plugin.OPTIMIZERS)
    ]
    return (*found, *(_owner("training.lr_scheduler_kwargs", name, model) for name, model in SCHEDULES.items()))


def _owner(place: str, method: str, model: type[Options]) -> _Owner:
    return _Owner(place, method, tuple(model.model_fields))


def unknown_section(source: Source, name: str) -> Problem:
    """Return the problem of a top-level key that is no section."""
    word = _visible(name)
    holders = [owner for owner in _owners() if name in owner.keys]
    near = nearest(word, SECTIONS)
    fix = "the sections are " + ", ".join(SECTIONS)
    if holders:
        label = f"`{word}` is a key of {holders[0]}"
        fix = f"put it below `{holders[0].place}:`"
    elif name in RENAMED:
        label = RENAMED[name]
    else:
        guess = near[0] if near else _near_elsewhere(word, "")
        label = f"did you mean `{guess}`?" if guess else ""
    return Problem("unknown-key", f"unknown section `{word}`", source.key((name,)), label, fix=fix)


def unknown_key(source: Source, path: KeyPath, known: Iterable[str], owner: str) -> Problem:
    """Return the problem of a key that its section (or plugin, named by `owner`) does not have."""
    word = _visible(str(path[-1]))
    place = ".".join(str(part) for part in path[:-1])
    label, fix = _advice(str(path[-1]), word, place, list(known), owner)
    where = f"`{owner}`" if owner == place else f"`{owner}` ({place})"
    return Problem("unknown-key", f"unknown key `{word}` in {where}", source.key(path), label, fix=fix)


def _advice(name: str, word: str, place: str, known: list[str], owner: str) -> tuple[str, str]:
    """Return what the key was probably meant to be, and what to do."""
    fix = f"`ftune explain {owner}` lists every key and its default"
    if (place, name) == ("tuning", "rank") and "r" in known:  # elsewhere it is a key of its own
        return "this is `r`", fix
    if name in RENAMED:
        return RENAMED[name], fix
    near = nearest(word, known)
    if near and difflib.SequenceMatcher(None, word, near[0]).ratio() > 0.84:
        return f"did you mean `{near[0]}`?", fix
    holders = [found for found in _owners() if name in found.keys]
    siblings = [str(found.method) for found in holders if found.place == place]
    if siblings:
        has = f"{owner} has: {', '.join(known)}" if known else f"{owner} has no options"
        return f"`{word}` belongs to {', '.join(siblings)}; {has}", f"remove it, or choose {' or '.join(siblings)}"
    if holders:
        return f"`{word}` is a key of {holders[0]}; this is `{place}`", f"move it below `{holders[0].place}:`"
    guess = near[0] if near else _near_elsewhere(word, place)
    if not known:
        fix = f"`{owner}` has no options"
    return f"did you mean `{guess}`?" if guess else "", fix


def _near_elsewhere(word: str, place: str) -> str:
    for owner in _owners():
        near = difflib.get_close_matches(word[:80], owner.keys, n=1, cutoff=0.8)
        if near and owner.place != place:
            return f"{owner.place}.{near[0]}"
    return ""


def missing_key(source: Source, path: KeyPath, example: str) -> Problem:
    """Return the problem of a required key that is not there."""
    *above, key = (str(part) for part in path)
    place = source.key(path[:-1])
    return Problem(
        "missing-key",
        f"`{'.'.join(above)}.{key}` is missing",
        place,
        f"needs `{key}`" if place.text else "",
        fix=f"add `{key}: {example}` below `{above[-1]}:`",
    )


def empty_value(source: Source, path: KeyPath, default: str) -> Problem:
    """Return the problem of a key with nothing behind it, for which nothing is no value."""
    fix = f"write a value, or remove the key to get the default, {default}" if default else "write a value"
    return Problem("bad-value", f"`{_dotted(path)}` has no value", source.value(path), "nothing stands here", fix=fix)


def bad_value(source: Source, path: KeyPath, errors: list[dict[str, Any]]) -> Problem:
    """Return the problem of a value that pydantic refused, one error for each type it could have been."""
    value = errors[0].get("input")
    expectations = [_expectation(error, value) for error in errors]
    bounds = [text for text, _ in expectations if text.startswith("must be")]
    expected = bounds[0] if bounds else " or ".join(dict.fromkeys(text for text, _ in expectations))
    expected = expected.replace(" or expected ", " or ")
    label = next((guess for _, guess in expectations if guess), "")
    return Problem(
        "bad-value",
        f"`{_dotted(path)}` cannot be {shown(value)}",
        source.value(path),
        label or expected,
        why=expected if label else "",
        fix=f"`ftune explain {next(part for part in reversed(path) if isinstance(part, str))}` says what it takes",
    )


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return the one nearest known word, if any is near; long words are no misspellings, and slow to compare."""
    return difflib.get_close_matches(word[:80], list(known), n=1)


def _dotted(path: KeyPath) -> str:
    return _visible(".".join(str(part) for part in path))


def _visible(text: str) -> str:
    """Return text that is fit for one line of a terminal."""
    plain = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return plain if len(plain) <= 60 else plain[:57] + "..."


def shown(value: Any) -> str:
    """Return a value as a message quotes it."""
    if value is True or value is False:
        return f"`{str(value).lower()}`"
    if isinstance(value, (int, float)):
        return f"`{_visible(str(value))}`"
    if isinstance(value, str):
        return f'the text "{_visible(value)}"'
    return _ARTICLES.get(type(value).__name__, type(value).__name__)


def _expectation(error: dict[str, Any], value: Any) -> tuple[str, str]:
    """Return what would be right, and a guess at what was meant."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(value), choices, n=1)
        return "one of " + ", ".join(choices), f"did you mean `{near[0]}`?" if near else ""
    if (
        "true or false" in str(error["msg"])
        and isinstance(value, str)
        and value.lower() in {"yes", "on", "no", "off", "y", "n"}
    ):
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
    if kind == "text" and isinstance(value, (int, float)):
        return str(error["msg"]), f'write it in quotes to make it text: "{written(value)}"'
    return _TYPES.get(kind, str(error["msg"])), ""


_TYPES = {
    "string_type": "expected text",
    "dict_type": "expected a mapping",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "bool_type": "expected true or false",
    "missing": "has too few items",
    "too_long": "has too many items",
    "too_short": "must have at least one item",
}
