"""Each rule fails on its own bad example, and on nothing else there; and passes on its good one."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from ftune.cli.console import render
from ftune.machine import Gpu, Machine, installed
from ftune.recipe import load
from ftune.recipe.schema import SECTIONS
from ftune.rules import RULES, Rule, check, is_machine_rule, newly_broken
from ftune.rules.check import example
from ftune.rules.explanations import explain_name, overview

_IDS = [rule.id for rule in RULES]


def machine_of(rule: Rule) -> Machine | None:
    return rule.bad_machine if rule.needs == "machine" else None


def good_machine_of(rule: Rule) -> Machine | None:
    return (rule.good_machine or rule.bad_machine) if rule.needs == "machine" else None


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
    found = check(example(rule.good), good_machine_of(rule))
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


@pytest.mark.parametrize(
    ("attention", "distribution", "install"),
    [
        ("flash_attention_2", "flash_attn", "pip install flash-attn"),
        ("flash_attention_3", "flash_attn_3", "setup.py install"),
    ],
)
def test_flash_attention_is_found_by_its_distribution(
    attention: str, distribution: str, install: str, tmp_path: Path
) -> None:
    loaded = example({"model": {"attn_implementation": attention}})
    hopper = Machine(gpus=(Gpu("H100", 2**36, (9, 0)),), packages={})
    (problem,) = check(loaded, hopper)
    assert install in problem.fix
    (tmp_path / f"{distribution}-3.0.0.dist-info").mkdir()
    assert not check(loaded, replace(hopper, packages=installed([str(tmp_path)])))


def test_a_revision_of_a_folder_is_told_wherever_the_folder_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = example({"model": {"model_name_or_path": "tiny", "revision": "v2"}, "data": {"train": "rows"}})
    monkeypatch.chdir(tmp_path)
    assert not check(loaded)
    (tmp_path / "tiny").mkdir()
    assert [problem.rule for problem in check(loaded)] == ["revision-unused"]


def test_what_the_rows_turn_out_to_be_can_break_a_rule() -> None:
    loaded = example({"data": {"assistant_only_loss": False, "chat_template": "chat.jinja", "packing": True}})
    assert not check(loaded)
    settled = replace(loaded.recipe, data=loaded.recipe.data.model_copy(update={"format": "prompt_completion"}))
    assert [problem.rule for problem in newly_broken(loaded, settled)] == ["assistant-only-loss-is-not-theirs"]
    settled = replace(loaded.recipe, data=loaded.recipe.data.model_copy(update={"format": "text"}))
    assert [problem.rule for problem in newly_broken(loaded, settled)] == ["chat-template-unused"]
    settled = replace(loaded.recipe, data=loaded.recipe.data.model_copy(update={"format": "messages"}))
    assert newly_broken(loaded, settled) == []


@pytest.mark.parametrize(
    ("warmup", "stable", "steps", "broken"),
    [(0, None, 100, False), (0, None, 99, True), (10, None, 109, True), (0.1, None, 110, True), (0, 0, 50, False)],
)
def test_a_schedule_longer_than_its_run(warmup: float, stable: int | None, steps: int, broken: bool) -> None:
    training = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 100, "num_stable_steps": stable},
        "warmup_steps": warmup,
    }
    assert bool(check(example({"training": {**training, "max_steps": steps}}))) == broken
    # What no rule can know of a number of epochs, the run can ask once it has counted its rows.
    loaded = example({"training": training})
    settled = replace(loaded.recipe, training=loaded.recipe.training.model_copy(update={"max_steps": steps}))
    assert bool(newly_broken(loaded, settled)) == broken


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


@pytest.mark.parametrize(("path", "told"), [("rows.jsonl", True), ("owner/rows", False)])
def test_splits_of_one_of_several_sources(path: str, told: bool) -> None:
    loaded = example({"data": {"train": [{"path": path}], "train_split": "test"}})
    assert ("train-split-unused" in [problem.rule for problem in check(loaded)]) is told
