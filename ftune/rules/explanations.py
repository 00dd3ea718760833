"""The texts of `ftune explain`."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence

from ftune import plugin
from ftune.errors import Problem, RecipeError
from ftune.findings import known_findings
from ftune.machine import Machine
from ftune.recipe.reference import Key, all_keys, key_table, keys_of
from ftune.recipe.schedules import SCHEDULES
from ftune.recipe.schema import SECTIONS
from ftune.recipe.source import written
from ftune.rules.check import example_problem
from ftune.rules.messages import MESSAGES
from ftune.rules.rule import Rule
from ftune.rules.table import RULES

_KINDS = {
    plugin.OPTIMIZERS: "training.optim",
    plugin.TUNINGS: "tuning.method",
    plugin.OBJECTIVES: "objective.method",
    plugin.FORMATS: "data.format",
    plugin.EXPORTS: "export.format",
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
    lines += ["", "Findings of the audit of the rows:"]
    lines += [f"  {kind:<20} {found.severity:<8} rows that {found.what}" for kind, found in known_findings().items()]
    lines += ["", "Other errors:"]
    lines += [f"  {name}" for name in sorted(MESSAGES)]
    return "\n".join(lines)


def explain_name(name: str) -> str:
    """Return what there is to say of a key, section, rule or method; raises RecipeError where there is none.

    A key or method may stand behind what it belongs to: `training.seed`, `lora.r`, `optim_args.betas`, `optim.sgd`.
    """
    keys = all_keys()
    *above, short = name.split(".")
    parts: list[str] = []
    if name in SECTIONS:
        parts.append(_section(name, keys))
    elif short == "optim" and _within(above, "training"):
        parts.append(_list_of(plugin.OPTIMIZERS))
    parts += [
        _method(kind, short) for kind, key in _KINDS.items() if short in plugin.names(kind) and _within(above, key)
    ]
    if short in SCHEDULES and _within(above, "training.lr_scheduler_type"):
        parts.append(_schedule(short))
    parts += [_rule(rule) for rule in RULES if rule.id == name]
    if name in known_findings():
        parts.append(_finding(known_findings()[name]))
    if name in MESSAGES:
        parts.append(f"{name}\n  {MESSAGES[name]}")
    owners = [key for key in keys if key.name == short and _within(above, key.owner)]
    if owners and name not in SECTIONS:
        parts.append("\n\n".join(_key(key) for key in owners))
    if not parts:
        raise RecipeError(_unknown(name, keys))
    return "\n\n".join(parts)


def _within(above: Sequence[str], owner: str) -> bool:
    """Return whether the words before a name are words of what it belongs to, in order; `tuning (lora)` has two."""
    words = iter(re.findall(r"\w+", owner))
    return all(word in words for word in above)


def _unknown(name: str, keys: Sequence[Key]) -> Problem:
    known = {key.name for key in keys} | set(SECTIONS) | {rule.id for rule in RULES} | set(MESSAGES)
    known |= set(known_findings())
    known |= {method for package in _KINDS for method in plugin.names(package)} | set(SCHEDULES)
    near = difflib.get_close_matches(name, known, n=3)
    fix = "did you mean " + " or ".join(near) + "?" if near else "`ftune explain` lists what there is"
    return Problem("unknown-name", f"there is nothing called `{name}`", fix=fix)


def _finding(found: plugin.Finding) -> str:
    ignore = f"to let it be: data.audit_ignore: [{found.kind}]"
    return "\n".join(
        [
            f"{found.kind} ({found.severity}, found in the rows by `ftune preview` and at the start of a run)",
            f"  rows that {found.what}",
            f"  why: {found.why}",
            f"  fix: {found.fix}; {ignore}",
        ]
    )


def _section(name: str, keys: Sequence[Key]) -> str:
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
        if (rate := found.default_adapter_learning_rate) is not None:
            lines.append(f"  learning_rate auto of an adapter: {rate:g}, {found.adapter_learning_rate_reason}")
    if isinstance(found, plugin.Format):
        lines.append(f"  a row: {found.columns}")
    if isinstance(found, plugin.Export):
        lines.append(f"  read by: {found.read_by}")
        lines += [f"  --dtype {dtype}: {limit}" for dtype, limit in _limits(found)]
        lines.append(f"  refuses: {found.refuses}")
    if found.needs:
        lines.append("  needs: " + ", ".join(found.needs))
    own = keys_of(name, found.Options)
    return "\n\n".join(["\n".join(lines), *[_key(key) for key in own]])


def _limits(form: plugin.Export) -> Iterator[tuple[str, str]]:
    """Yield each type that weights can be stored in, and how far that may be off, in words."""
    for dtype, tolerance in form.tolerances.items():
        limit = f"at most {tolerance}" if tolerance else "what it costs is told"
        yield dtype, f"{limit}; {plugin.BEFORE_ROUNDING.limit:g} before rounding" if dtype in form.rounds else limit


def _schedule(name: str) -> str:
    model = SCHEDULES[name]
    keys = keys_of(f"training.lr_scheduler_kwargs ({name})", model)
    return "\n\n".join([f"training.lr_scheduler_type: {name}\n  {inspect.getdoc(model)}", *[_key(key) for key in keys]])


def _key(key: Key) -> str:
    return f"{key.owner}: {key.name}\n  {key.text}\n  takes {key.kind}; default {key.default}"


def _rule(rule: Rule) -> str:
    problem = example_problem(rule)
    return "\n".join(
        [
            f"{rule.id} ({rule.severity}, {'checked on the machine' if rule.needs == 'machine' else 'always checked'})",
            f"  {problem.what}",
            f"  why: {problem.why}",
            f"  fix: {problem.fix}",
            f"  fails: {flow(rule.bad)}{_on(rule, rule.bad_machine)}",
            f"  works: {flow(rule.good)}{_on(rule, rule.good_machine)}",
        ]
    )


def _on(rule: Rule, machine: Machine | None) -> str:
    """Return on which machine an example fails or works, where the recipe makes no difference."""
    if rule.good_machine is None or machine is None:
        return ""
    if machine.unknown_device:
        return f", with CUDA_VISIBLE_DEVICES={machine.unknown_device} where there is no such GPU"
    gpu = machine.gpus[0].name if machine.gpus else ""
    return f", on an {gpu} with torch {machine.packages['torch']}" if gpu else ", without it"


def rule_pages() -> str:
    """Return every rule as Markdown, for the documentation."""
    return "\n\n".join(_rule_page(rule) for rule in RULES)


def _rule_page(rule: Rule) -> str:
    problem = example_problem(rule)
    where = "checked on the machine" if rule.needs == "machine" else "always checked"
    return "\n".join(
        [
            f"### {rule.id}",
            "",
            f"*{rule.severity}, {where}.* {_sentence(problem.what)} {_sentence(problem.why)}",
            "",
            f"* fails: `{flow(rule.bad)}`{_on(rule, rule.bad_machine)}",
            f"* works: `{flow(rule.good)}`{_on(rule, rule.good_machine)}",
            f"* fix: {problem.fix}",
        ]
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def method_pages(package: str) -> str:
    """Return every plugin of one kind as Markdown, for the documentation."""
    return "\n\n".join(f"### {name}\n\n{_method_page(package, name)}" for name in plugin.names(package))


def _method_page(package: str, name: str) -> str:
    found = plugin.get(package, name)
    lines = [found.summary]
    if isinstance(found, plugin.Optimizer):
        note = f" ({found.state_bytes_note})" if found.state_bytes_note else ""
        lines += ["", f"* Gradients: {found.gradients.value}."]
        lines.append(f"* Optimizer state: {found.state_bytes_per_parameter:g} bytes per trained weight{note}.")
        lines.append(f"* Over several devices: {found.sharding.value}.")
        lines.append(f"* `learning_rate: auto` is {found.default_learning_rate:g}: {found.learning_rate_reason}.")
        if (rate := found.default_adapter_learning_rate) is not None:
            lines.append(f"* `learning_rate: auto` of an adapter is {rate:g}: {found.adapter_learning_rate_reason}.")
    if isinstance(found, plugin.Tuning) and not found.splits:
        lines += ["", f"* Not split over devices: {found.split_note}."]
    if isinstance(found, plugin.Format):
        lines += ["", f"* A row: `{found.columns}`"]
    if isinstance(found, plugin.Export):
        lines += ["", f"* Read by {found.read_by}.", f"* Refuses {found.refuses}."]
        lines += [f"* `--dtype {dtype}`: {limit}." for dtype, limit in _limits(found)]
    if found.needs:
        lines += ["", "* Needs: " + ", ".join(f"`{need}`" for need in found.needs)]
    owners = {plugin.OPTIMIZERS: "training.optim_args", plugin.TUNINGS: "tuning", plugin.OBJECTIVES: "objective"}
    if package in owners and found.Options.model_fields:
        lines += ["", key_table(f"{owners[package]} ({name})")]
    return "\n".join(lines)


def flow(value: object) -> str:
    """Return an example on one line, as YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    return written(value)
