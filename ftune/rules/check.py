"""Run every row and collect every problem, each with its place in the recipe."""

from __future__ import annotations

from ftune.errors import Problem
from ftune.machine import Machine
from ftune.recipe import Loaded
from ftune.recipe.source import KeyPath, Source
from ftune.rules.rule import Facts, Rule
from ftune.rules.table import RULES


def check(loaded: Loaded, machine: Machine | None = None) -> list[Problem]:
    """Return what the rules say of a recipe, errors first; machine rules only where a machine is given."""
    facts = Facts(loaded.recipe, machine)
    found = [_problem(rule, facts, loaded.source) for rule in RULES if broken(rule, facts)]
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda problem: order[problem.severity])


def broken(rule: Rule, facts: Facts) -> bool:
    """Return whether one rule is broken."""
    return (rule.needs == "recipe" or facts.machine is not None) and rule.when(facts)


def is_machine_rule(problem: Problem) -> bool:
    """Return whether a problem is the machine's (exit code 3) rather than the recipe's (exit code 2)."""
    return any(rule.id == problem.rule and rule.needs == "machine" for rule in RULES)


def _problem(rule: Rule, facts: Facts, source: Source) -> Problem:
    words = facts.words()
    path = _path(rule.at)
    also = tuple(
        (source.value(_path(key)), label.format(**words)) for key, label in rule.also if _path(key) in source.marks
    )
    return Problem(
        rule.id,
        rule.what.format(**words),
        source.value(path),
        rule.label.format(**words),
        why=rule.because.format(**words),
        fix=rule.instead.format(**words),
        also=also,
        severity=rule.severity,
    )


def _path(key: str) -> KeyPath:
    return tuple(key.split("."))
