"""The texts of `ftune explain`."""

from __future__ import annotations

import difflib
import inspect

from ftune import plugin
from ftune.errors import Problem, RecipeError
from ftune.recipe.reference import Key, all_keys, keys_of
from ftune.recipe.schema import SECTIONS
from ftune.rules.rule import Rule
from ftune.rules.table import RULES

_KINDS = {
    plugin.OPTIMIZERS: "training.optim",
    plugin.TUNINGS: "tuning.method",
    plugin.OBJECTIVES: "objective.method",
    plugin.FORMATS: "data.format",
}


def overview() -> str:
    """Return the list of everything that can be explained."""
    lines = ["Sections of a recipe, and their keys:"]
    for section, model in SECTIONS.items():
        names = ", ".join(model.model_fields) if model else "method, and that method's own keys"
        lines.append(f"  {section}: {names}")
    for package, key in _KINDS.items():
        lines += ["", f"{key}:"]
        lines += [f"  {name:<20} {plugin.get(package, name).summary}" for name in plugin.names(package)]
    lines += ["", "Rules:"]
    lines += [f"  {rule.id:<40} {rule.severity}" for rule in RULES]
    return "\n".join(lines)


def explain_name(name: str) -> str:
    """Return what there is to say of a key, section, rule or method; raises RecipeError where there is none."""
    keys = all_keys()
    short = name.rpartition(".")[2]
    parts: list[str] = []
    if name in SECTIONS:
        parts.append(_section(name, keys))
    elif name == "optim":
        parts.append(_list_of(plugin.OPTIMIZERS))
    for package in _KINDS:
        if short in plugin.names(package):
            parts.append(_method(package, short))
    parts += [_rule(rule) for rule in RULES if rule.id == name]
    owners = [key for key in keys if key.name == short and (name == short or key.owner.startswith(name.split(".")[0]))]
    if owners and name not in SECTIONS:
        parts.append("\n\n".join(_key(key) for key in owners))
    if not parts:
        known = {key.name for key in keys} | set(SECTIONS) | {rule.id for rule in RULES}
        known |= {method for package in _KINDS for method in plugin.names(package)}
        near = difflib.get_close_matches(name, known, n=3)
        fix = "did you mean " + " or ".join(near) + "?" if near else "`ftune explain` lists what there is"
        raise RecipeError(Problem("unknown-name", f"there is nothing called `{name}`", fix=fix))
    return "\n\n".join(parts)


def _section(name: str, keys: list[Key]) -> str:
    model = SECTIONS[name]
    heading = f"{name}: {inspect.getdoc(model)}" if model else f"{name}: its `method` says which keys it has"
    return "\n\n".join([heading, *[_key(key) for key in keys if key.owner.split(" ")[0] == name]])


def _list_of(package: str) -> str:
    lines = [f"{_KINDS[package]} is one of:"]
    return "\n".join(lines + [f"  {name:<20} {plugin.get(package, name).summary}" for name in plugin.names(package)])


def _method(package: str, name: str) -> str:
    found = plugin.get(package, name)
    lines = [f"{_KINDS[package]}: {name}", f"  {found.summary}"]
    if isinstance(found, plugin.Optimizer):
        note = f" ({found.state_bytes_note})" if found.state_bytes_note else ""
        lines.append(f"  gradients: {found.gradients.value}")
        lines.append(f"  optimizer state: {found.state_bytes_per_parameter:g} bytes per weight{note}")
        lines.append(f"  learning_rate auto: {found.default_learning_rate:g}, {found.learning_rate_reason}")
    if isinstance(found, plugin.Format):
        lines.append(f"  a row: {found.columns}")
    if found.needs:
        lines.append("  needs: " + ", ".join(found.needs))
    own = list(keys_of(name, found.Options))
    return "\n\n".join(["\n".join(lines), *[_key(key) for key in own]])


def _key(key: Key) -> str:
    return f"{key.owner}: {key.name}\n  {key.text}\n  takes {key.kind}; default {key.default}"


def _rule(rule: Rule) -> str:
    return "\n".join(
        [
            f"{rule.id} ({rule.severity}, {'checked on the machine' if rule.needs == 'machine' else 'always checked'})",
            f"  {rule.what}",
            f"  why: {rule.because}",
            f"  fix: {rule.instead}",
            f"  fails: {_flow(rule.bad)}",
            f"  works: {_flow(rule.good)}",
        ]
    )


def _flow(example: object) -> str:
    import json

    return json.dumps(example).replace('"', "")
