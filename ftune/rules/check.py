"""Run every row and collect every problem, each with its place in the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ftune.errors import Problem
from ftune.machine import Machine
from ftune.recipe import Loaded, load
from ftune.recipe.schema import SECTIONS, Recipe
from ftune.recipe.source import KeyPath, Source
from ftune.rules.rule import Facts, Rule
from ftune.rules.table import RULES


def check(loaded: Loaded, machine: Machine | None = None) -> list[Problem]:
    """Return what the rules say of a recipe; machine rules only where a machine is given."""
    facts = facts_of(loaded, machine)
    return [_problem(rule, facts, loaded.source) for rule in RULES if broken(rule, facts)]


def newly_broken(loaded: Loaded, settled: Recipe) -> list[Problem]:
    """Return what the rules say of a recipe only now that more of it is settled."""
    before = {problem.rule for problem in check(loaded)}
    return [problem for problem in check(replace(loaded, recipe=settled)) if problem.rule not in before]


def facts_of(loaded: Loaded, machine: Machine | None = None) -> Facts:
    """Return what the rules look at."""
    sections = loaded.source.data.items()
    given = {f"{section}.{key}" for section, keys in sections if isinstance(keys, dict) for key in keys}
    return Facts(loaded.recipe, machine, frozenset(given), loaded.directory)


def broken(rule: Rule, facts: Facts) -> bool:
    """Return whether one rule is broken."""
    return (rule.needs == "recipe" or facts.machine is not None) and rule.when(facts)


def is_machine_rule(problem: Problem) -> bool:
    """Return whether a problem is the machine's (exit code 3) rather than the recipe's (exit code 2)."""
    return any(rule.id == problem.rule and rule.needs == "machine" for rule in RULES)


def example_problem(rule: Rule) -> Problem:
    """Return what a rule says of its own failing example."""
    loaded = example(rule.bad)
    return _problem(rule, facts_of(loaded, rule.bad_machine if rule.needs == "machine" else None), loaded.source)


def example(changes: Mapping[str, Mapping[str, Any]]) -> Loaded:
    """Return the smallest recipe with some keys changed."""
    smallest = {
        "model": {"model_name_or_path": "my-model"},
        "data": {"train": "train.jsonl"},
        "training": {"output_dir": "runs/my-run"},
    }
    return load({section: {**smallest.get(section, {}), **changes.get(section, {})} for section in SECTIONS})


def _problem(rule: Rule, facts: Facts, source: Source) -> Problem:
    words = facts.words()
    keys = [(rule.at, rule.label), *rule.also]
    # The caret goes where the reader wrote something: one of the other keys where the rule's own stands nowhere.
    here = [(_path(key), label.format(**words)) for key, label in keys if _path(key) in source.marks]
    (path, label), *others = here or [(_path(rule.at), rule.label.format(**words))]
    also = tuple((source.value(other), text) for other, text in others)
    return Problem(
        rule.id,
        rule.what.format(**words),
        source.value(path),
        label,
        why=rule.because.format(**words),
        fix=rule.instead.format(**words),
        also=also,
        severity=rule.severity,
    )


def _path(key: str) -> KeyPath:
    return tuple(key.split("."))
