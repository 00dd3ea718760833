"""Rows on which rows are drawn and how they share a batch."""

from __future__ import annotations

from ftune.recipe.schema import listed
from ftune.rules.rule import Facts, Rule

_MIX = {"data": {"train": [{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 1}]}}
_TWO = ["a.jsonl", "b.jsonl"]


def _planned(facts: Facts) -> bool:
    return facts.recipe.training.group_by_length or facts.recipe.training.max_tokens_per_batch is not None


RULES: tuple[Rule, ...] = (
    Rule(
        id="weights-or-temperature",
        at="data.mixing_temperature",
        when=lambda f: f.recipe.data.is_weighted and f.recipe.data.mixing_temperature is not None,
        what="sources cannot be mixed by weights and by a temperature at once",
        because="each says how many rows of a source are drawn",
        instead="remove mixing_temperature, or the weights",
        also=(("data.train", "weights"),),
        bad={"data": {**_MIX["data"], "mixing_temperature": 2}},
        good={"data": {"train": _TWO, "mixing_temperature": 2}},
    ),
    Rule(
        id="mixing-needs-sources",
        at="data.mixing_temperature",
        when=lambda f: f.recipe.data.is_mixed and len(listed(f.recipe.data.train)) < 2,
        what="there is nothing to mix",
        because="data.train names one source",
        instead="name several sources, or remove mixing_temperature and the weight",
        also=(("data.train", "one source"),),
        bad={"data": {"mixing_temperature": 2}},
        good={"data": {"train": _TWO, "mixing_temperature": 2}},
    ),
    Rule(
        id="mixing-stop-unused",
        at="data.mixing_stop",
        when=lambda f: "data.mixing_stop" in f.given and (not f.recipe.data.is_mixed or f.recipe.data.streaming),
        what="mixing_stop would be ignored",
        because="without weights each row is seen once; a stream has no end",
        instead="remove mixing_stop, or give the sources of rows on the disk weights",
        bad={"data": {"mixing_stop": "first_exhausted"}},
        good={"data": {**_MIX["data"], "mixing_stop": "first_exhausted"}},
    ),
    Rule(
        id="temperature-needs-counts",
        at="data.mixing_temperature",
        when=lambda f: f.recipe.data.streaming and f.recipe.data.mixing_temperature is not None,
        what="streamed sources cannot be mixed by a temperature",
        because="nobody knows how many rows they have",
        instead="give each source a weight",
        bad={"data": {"train": _TWO, "mixing_temperature": 2, "streaming": True}, "training": {"max_steps": 9}},
        good={"data": {**_MIX["data"], "streaming": True}, "training": {"max_steps": 9}},
    ),
    Rule(
        id="streams-are-not-counted-together",
        at="data.max_train_samples",
        when=lambda f: (
            f.recipe.data.streaming
            and f.recipe.data.max_train_samples is not None
            and len(listed(f.recipe.data.train)) > 1
        ),
        what="max_train_samples cannot count the rows of several streams",
        because="each is read as far as the mix needs it",
        instead="set training.max_steps, which ends the run, and remove max_train_samples",
        bad={"data": {"train": _TWO, "streaming": True, "max_train_samples": 9}, "training": {"max_steps": 9}},
        good={"data": {"train": _TWO, "streaming": True}, "training": {"max_steps": 9}},
    ),
    Rule(
        id="evaluation-has-no-weights",
        at="data.eval",
        when=lambda f: any(source.weight is not None for source in listed(f.recipe.data.eval)),
        what="evaluation rows have no weights",
        because="each of them is seen once, and each source's loss is told apart",
        instead="remove the weights below data.eval",
        bad={"data": {"eval": [{"path": "a.jsonl", "weight": 2}]}},
        good={"data": {"eval": ["a.jsonl", "b.jsonl"]}},
    ),
    Rule(
        id="packed-rows-need-no-grouping",
        at="data.packing",
        when=lambda f: f.recipe.data.packing and _planned(f),
        what="packed sequences are not grouped by length",
        because="each is nearly data.max_length long already",
        instead="set packing: false, or remove group_by_length and max_tokens_per_batch",
        also=(("training.group_by_length", ""), ("training.max_tokens_per_batch", "")),
        bad={"data": {"packing": True}, "training": {"group_by_length": True}},
        good={"training": {"group_by_length": True}},
    ),
    Rule(
        id="streams-have-no-lengths",
        at="data.streaming",
        when=lambda f: f.recipe.data.streaming and _planned(f),
        what="streamed rows cannot be grouped by length",
        because="they come one after another",
        instead="set data.packing: true, which fills sequences from a stretch of the stream",
        also=(("training.group_by_length", ""), ("training.max_tokens_per_batch", "")),
        bad={"data": {"streaming": True}, "training": {"group_by_length": True, "max_steps": 9}},
        good={"data": {"streaming": True, "packing": True}, "training": {"max_steps": 9}},
    ),
    Rule(
        id="rows-or-tokens-per-batch",
        at="training.max_tokens_per_batch",
        when=lambda f: (
            f.recipe.training.max_tokens_per_batch is not None and "training.per_device_train_batch_size" in f.given
        ),
        what="a batch cannot hold a number of rows and a number of tokens",
        because="max_tokens_per_batch takes as many rows as fit",
        instead="remove one of the two",
        also=(("training.per_device_train_batch_size", "rows"),),
        bad={"training": {"max_tokens_per_batch": 4096, "per_device_train_batch_size": 4}},
        good={"training": {"max_tokens_per_batch": 4096}},
    ),
    Rule(
        id="batch-holds-a-row",
        at="training.max_tokens_per_batch",
        when=lambda f: (f.recipe.training.max_tokens_per_batch or f.recipe.data.max_length) < f.recipe.data.max_length,
        what="a batch of {max_tokens} tokens does not hold a row of {max_length}",
        because="data.max_length says how long a row may be",
        instead="raise max_tokens_per_batch, or lower data.max_length",
        also=(("data.max_length", "rows up to here"),),
        bad={"training": {"max_tokens_per_batch": 1000}},
        good={"training": {"max_tokens_per_batch": 1000}, "data": {"max_length": 500}},
    ),
)
