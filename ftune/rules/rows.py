"""Rows on the data: formats, what of a row is learned, streaming, packing."""

from __future__ import annotations

from ftune.rules.rule import Facts, Rule


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


RULES: tuple[Rule, ...] = (
    Rule(
        id="objective-reads-format",
        at="data.format",
        when=lambda f: f.recipe.data.format != "auto" and f.recipe.data.format not in f.objective.formats,
        what="{objective} cannot learn from `{format}` rows",
        because="it reads {formats}",
        instead="set data.format: auto, or choose the objective for these rows",
        bad={"objective": {"method": "pretrain"}, "data": {"format": "alpaca"}},
        good={"objective": {"method": "pretrain"}, "data": {"format": "text"}},
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
)
