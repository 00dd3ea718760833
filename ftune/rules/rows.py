"""Rows on the data: formats, what of a row is learned, streaming, packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftune import plugin
from ftune.recipe.schema import listed
from ftune.rules.rule import Facts, Rule


def _source_not_read(facts: Facts) -> bool:
    """Whether one of several sources names a format that the objective cannot learn from."""
    data = facts.recipe.data
    named = {source.format for source in (*listed(data.train), *listed(data.eval))}
    return bool(named & set(plugin.names(plugin.FORMATS)) - facts.objective.formats)


def _loss_setting_ignored(facts: Facts, key: str) -> bool:
    """Whether a loss setting asks for what rows of the named format will not do."""
    if facts.format is None or f"data.{key}" not in facts.given:
        return False
    answers_only = bool(getattr(facts.recipe.data, key))
    return answers_only if facts.format.trains_whole_text else not answers_only and facts.format.loss_setting != key


def _loss_setting_rule(key: str, bad_format: str, good_format: str) -> Rule:
    return Rule(
        id=key.replace("_", "-") + "-is-not-theirs",
        at=f"data.{key}",
        when=lambda f: _loss_setting_ignored(f, key),
        what=f"{key} would be ignored: `{{format}}` rows do not follow it",
        because="{loss_rule}",
        instead=f"remove {key}; `{{format}}` rows follow {{loss_setting}}",
        also=(("data.format", "these rows"),),
        bad={"data": {"format": bad_format, key: False}},
        good={"data": {"format": good_format, key: False}},
    )


def _unused(key: str, when: Callable[[Facts], bool], because: str, instead: str, **examples: Any) -> Rule:
    """Return the warning that a key which the recipe gives has no part in the run."""
    name = key.partition(".")[2]
    return Rule(
        id=f"{name.replace('_', '-')}-unused",
        at=key,
        when=lambda f: f.wants(key) and when(f),
        what=f"{name} would be ignored",
        because=because,
        instead=instead,
        severity="warning",
        **examples,
    )


_UNUSED = (
    _unused(
        "model.revision",
        lambda f: f.model_is_local,
        "a folder or a package has no revisions: what is in it is taken",
        "remove revision, or name a model of a hub",
        bad={"model": {"model_name_or_path": "./my-model", "revision": "v2"}},
        good={"model": {"model_name_or_path": "owner/my-model", "revision": "v2"}},
    ),
    _unused(
        "data.train_split",
        lambda f: not f.rows_are_on_a_hub("train"),
        "data.train names files, and only a data set of a hub has splits",
        "remove train_split, or name a data set of a hub",
        bad={"data": {"train": "train.jsonl", "train_split": "test"}},
        good={"data": {"train": "owner/my-data", "train_split": "test"}},
    ),
    _unused(
        "data.eval_split",
        lambda f: not f.rows_are_on_a_hub("eval"),
        "data.eval names no data set of a hub, and nothing else has splits",
        "remove eval_split, or set data.eval to a data set of a hub",
        bad={"data": {"eval": "eval.jsonl", "eval_split": "test"}},
        good={"data": {"eval": "owner/my-data", "eval_split": "test"}},
    ),
    _unused(
        "data.train_on_turns",
        lambda f: not f.recipe.data.assistant_only_loss or (f.format is not None and f.format.templated is False),
        "with assistant_only_loss: false, and in plain text, every token is learned",
        "remove train_on_turns, or learn answers only",
        bad={"data": {"train_on_turns": "last", "assistant_only_loss": False}},
        good={"data": {"train_on_turns": "last"}},
    ),
    _unused(
        "data.max_eval_samples",
        lambda f: f.recipe.data.eval is None,
        "data.eval is not set: there are no evaluation rows",
        "set data.eval, or remove max_eval_samples",
        bad={"data": {"max_eval_samples": 100}},
        good={"data": {"max_eval_samples": 100, "eval": "eval.jsonl"}},
    ),
    _unused(
        "data.chat_template",
        lambda f: f.format is not None and f.format.templated is False,
        "`{format}` rows are learned as they stand",
        "remove chat_template",
        bad={"data": {"format": "text", "chat_template": "chat.jinja"}},
        good={"data": {"format": "messages", "chat_template": "chat.jinja"}},
    ),
    _unused(
        "data.shuffle_buffer_size",
        lambda f: not f.recipe.data.streaming,
        "without streaming all rows are drawn from at once",
        "set data.streaming: true, or remove shuffle_buffer_size",
        bad={"data": {"shuffle_buffer_size": 100}},
        good={"data": {"shuffle_buffer_size": 100, "streaming": True}, "training": {"max_steps": 100}},
    ),
)

RULES: tuple[Rule, ...] = (
    Rule(
        id="objective-reads-format",
        at="data.format",
        when=lambda f: f.recipe.data.format != "auto" and f.recipe.data.format not in f.objective.formats,
        what="{objective} cannot learn from `{format}` rows",
        because="it reads {formats}",
        instead="set data.format to how the rows are written, or choose an objective that reads `{format}` rows",
        bad={"objective": {"method": "pretrain"}, "data": {"format": "alpaca"}},
        good={"objective": {"method": "pretrain"}, "data": {"format": "text"}},
    ),
    Rule(
        id="objective-reads-every-source",
        at="data.train",
        when=_source_not_read,
        what="{objective} cannot learn from the format that one of the sources names",
        because="it reads {formats}",
        instead="set that source's format to how its rows are written, or choose an objective that reads them",
        bad={"objective": {"method": "pretrain"}, "data": {"train": [{"path": "chats.jsonl", "format": "messages"}]}},
        good={"objective": {"method": "pretrain"}, "data": {"train": [{"path": "books.jsonl", "format": "text"}]}},
    ),
    _loss_setting_rule("assistant_only_loss", "prompt_completion", "messages"),
    _loss_setting_rule("completion_only_loss", "messages", "prompt_completion"),
    Rule(
        id="streaming-needs-max-steps",
        at="data.streaming",
        when=lambda f: f.recipe.data.streaming and f.recipe.training.max_steps <= 0,
        what="a streamed data set has no length",
        because="the learning rate schedule has to know where the run ends",
        instead="set training.max_steps",
        bad={"data": {"streaming": True}},
        good={"data": {"streaming": True}, "training": {"max_steps": 100}},
    ),
    Rule(
        id="streaming-cannot-split",
        at="data.eval",
        when=lambda f: f.recipe.data.streaming and isinstance(f.recipe.data.eval, float),
        what="a fraction of a streamed data set cannot be held out",
        because="its number of rows is not known",
        instead="name a file of evaluation rows",
        bad={"data": {"streaming": True, "eval": 0.05}, "training": {"max_steps": 100}},
        good={"data": {"streaming": True, "eval": "eval.jsonl"}, "training": {"max_steps": 100}},
    ),
    Rule(
        id="prefetch-needs-workers",
        at="training.dataloader_prefetch_factor",
        when=lambda f: (
            f.recipe.training.dataloader_prefetch_factor is not None and f.recipe.training.dataloader_num_workers == 0
        ),
        what="without workers nothing is prepared ahead",
        because="dataloader_num_workers is 0",
        instead="set dataloader_num_workers: 2, or remove dataloader_prefetch_factor",
        bad={"training": {"dataloader_prefetch_factor": 4}},
        good={"training": {"dataloader_prefetch_factor": 4, "dataloader_num_workers": 2}},
    ),
    Rule(
        id="packing-needs-position-aware-attention",
        at="data.packing",
        when=lambda f: f.recipe.data.packing and f.recipe.training.torch_compile,
        what="packed rows cannot be told apart in a compiled model",
        because="transformers finds their borders from position ids, which it does not do while compiling",
        instead="set torch_compile: false, or packing: false",
        also=(("training.torch_compile", "compiles the model"),),
        bad={"data": {"packing": True}, "training": {"torch_compile": True}},
        good={"data": {"packing": True}},
    ),
    *_UNUSED,
)
