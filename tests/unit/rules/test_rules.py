"""Each rule fails on its own bad example, and on nothing else there; and passes on its good one."""

from __future__ import annotations

import io

import pytest

from ftune.cli.console import render
from ftune.machine import Machine
from ftune.recipe import load
from ftune.recipe.schema import SECTIONS
from ftune.rules import RULES, Rule, check, is_machine_rule
from ftune.rules.check import example
from ftune.rules.explanations import explain_name, overview

_IDS = [rule.id for rule in RULES]


def machine_of(rule: Rule) -> Machine | None:
    return rule.bad_machine if rule.needs == "machine" else None


@pytest.mark.parametrize("rule", RULES, ids=_IDS)
def test_bad_example_breaks_this_rule_only(rule: Rule) -> None:
    found = check(example(rule.bad), machine_of(rule))
    assert [problem.rule for problem in found] == [rule.id]
    (problem,) = found
    assert problem.severity == rule.severity
    assert is_machine_rule(problem) == (rule.needs == "machine")
    assert problem.where is not None
    assert problem.where.line is not None, "the caret stands on a key that the example names"
    for text in (problem.what, problem.why, problem.fix):
        assert text
        assert "{optim" not in text
    assert render(problem, io.StringIO())


@pytest.mark.parametrize("rule", RULES, ids=_IDS)
def test_good_example_breaks_no_rule(rule: Rule) -> None:
    found = check(example(rule.good), machine_of(rule))
    assert [problem.rule for problem in found if problem.severity == "error" or problem.rule == rule.id] == []


@pytest.mark.parametrize("rule", RULES, ids=_IDS)
def test_every_rule_is_explained(rule: Rule) -> None:
    text = explain_name(rule.id)
    for piece in (rule.id, "why:", "fix:", "fails:", "works:"):
        assert piece in text
    assert rule.id in overview()
    assert not {"{optim}", "{attention}", "{{"} & set(text.split())


def test_ids_are_unique_and_places_are_keys() -> None:
    assert len(set(_IDS)) == len(RULES)
    for rule in RULES:
        for key in (rule.at, *(key for key, _ in rule.also)):
            section, name = key.split(".")
            model = SECTIONS[section]
            assert model is None or name in model.model_fields


def test_package_rule_reads_what_a_plugin_needs() -> None:
    loaded = example({"training": {"optim": "adamw_8bit"}, "tuning": {"method": "lora"}})
    (problem,) = [found for found in check(loaded, Machine(packages={"peft": "1"})) if found.severity == "error"]
    assert problem.what == "bitsandbytes is not installed"
    assert problem.fix == "pip install bitsandbytes"
    assert not check(loaded, Machine(packages={"bitsandbytes": "1", "peft": "1"}))


def test_machine_rules_wait_for_a_machine() -> None:
    assert not check(example({"training": {"optim": "adamw_8bit", "tf32": True}}))


def test_caret_goes_to_the_key_that_is_there() -> None:
    loaded = example({"distributed": {"engine": "fsdp"}})
    (problem,) = check(loaded)
    assert problem.where == loaded.source.value(("distributed", "engine"))


def test_a_rule_broken_by_set_points_at_the_argument() -> None:
    data = {"model": {"model_name_or_path": "m"}, "data": {"train": "t"}, "training": {"output_dir": "o", "bf16": True}}
    (problem,) = check(load(data, ["training.fp16=true"]))
    assert str(problem.where) == "--set #1"
    assert problem.also[0][0].line is not None


@pytest.mark.parametrize("format", ["messages", "alpaca", "sharegpt", "prompt_completion", "text"])
@pytest.mark.parametrize("key", ["assistant_only_loss", "completion_only_loss"])
@pytest.mark.parametrize("value", [True, False])
def test_a_loss_setting_that_would_do_nothing_is_told(format: str, key: str, value: bool) -> None:
    """Silent only where the rows do what the setting says."""
    found = check(example({"data": {"format": format, key: value}}))
    follows = {"text": "", "prompt_completion": "completion_only_loss"}.get(format, "assistant_only_loss")
    learned_alone = format != "text"
    assert bool(found) == (key != follows and value != learned_alone)
