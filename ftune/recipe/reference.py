"""What there is to say about every key, rule and method: one text for `ftune explain`, `ftune schema` and the docs."""

from __future__ import annotations

import ast
import inspect
import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from ftune import plugin
from ftune.options import Options
from ftune.recipe.schedules import SCHEDULES
from ftune.recipe.schema import PLUGIN_SECTIONS, SECTIONS, Source
from ftune.recipe.source import written


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    owner: str
    """`training`, or `tuning (lora)` for a plugin's own key."""
    name: str
    kind: str
    default: str
    text: str


@cache
def field_texts(model: type[Options]) -> dict[str, str]:
    """Return the string under each field of a settings model, read from its source and that of its bases."""
    texts: dict[str, str] = {}
    for base in reversed(model.__bases__):
        texts |= field_texts(base) if issubclass(base, Options) else {}
    tree = ast.parse(inspect.getsource(model))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                texts[statement.target.id] = " ".join(value.value.split())
    return texts


@cache
def keys_of(owner: str, model: type[Options]) -> tuple[Key, ...]:
    """Return the keys of one settings model in order."""
    schema = model.model_json_schema()["properties"] if model.model_fields else {}
    texts = field_texts(model)
    found = []
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else written(field.get_default(call_default_factory=True))
        found.append(Key(owner, name, _kind(schema[name]), default, texts.get(name, "")))
    return tuple(found)


@cache
def all_keys() -> tuple[Key, ...]:
    """Return every key of every section and plugin."""
    found: list[Key] = []
    for section, model in SECTIONS.items():
        if model is not None:
            found += keys_of(section, model)
            if section == "data":
                found += keys_of("data.train (several)", Source)
            continue
        package, default = PLUGIN_SECTIONS[section]
        choices = " | ".join(plugin.names(package))
        found.append(
            Key(section, "method", choices, default, f"Which {section}; the other keys are that method's own.")
        )
        for name in plugin.names(package):
            found += keys_of(f"{section} ({name})", plugin.get(package, name).Options)
    for name in plugin.names(plugin.OPTIMIZERS):
        found += keys_of(f"training.optim_args ({name})", plugin.optimizer(name).Options)
    for name, model in SCHEDULES.items():
        found += keys_of(f"training.lr_scheduler_kwargs ({name})", model)
    return tuple(found)


def key_table(owner: str) -> str:
    """Return the keys of one owner as a Markdown table, for the documentation."""
    rows = [key for key in all_keys() if key.owner == owner]
    if not rows:
        return "No keys of its own."
    cells = [(f"`{key.name}`", _cell(key.kind), f"`{key.default}`", _cell(key.text)) for key in rows]
    lines = ["| key | takes | default | |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a recipe."""
    properties: dict[str, Any] = {}
    for section, model in SECTIONS.items():
        if model is not None:
            properties[section] = _section_schema(model)
            continue
        package, default = PLUGIN_SECTIONS[section]
        branches = []
        for name in plugin.names(package):
            branch = _section_schema(plugin.get(package, name).Options)
            branch["properties"] = {"method": {"const": name}, **branch.get("properties", {})}
            if name != default:
                branch["required"] = ["method"]
            branches.append(branch)
        properties[section] = {"oneOf": branches}
    optim = properties["training"]["properties"]["optim"]
    optim["enum"] = list(plugin.names(plugin.OPTIMIZERS))
    properties["data"]["properties"]["format"]["enum"] = ["auto", *plugin.names(plugin.FORMATS)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ftune recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["model", "data", "training"],
        "properties": properties,
    }


def _section_schema(model: type[Options]) -> dict[str, Any]:
    schema = model.model_json_schema()
    for name, text in field_texts(model).items():
        schema["properties"][name]["description"] = text
    schema.pop("title", None)
    schema["description"] = inspect.getdoc(model) or ""
    # A section is a part of the whole: what it refers to is written where it stands.
    schema = _inlined(schema, schema.pop("$defs", {}))
    return _standard(schema)  # type: ignore[no-any-return]


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {word: _inlined(part, definitions) for word, part in schema.items()}


_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def _standard(schema: Any) -> Any:
    """Return a schema with bounds as JSON Schema calls them: pydantic leaves its own words beside a BeforeValidator."""
    if isinstance(schema, list):
        return [_standard(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "properties" in schema:
        inner = {name: _standard(part) for name, part in schema["properties"].items()}
        rest = {word: part for word, part in schema.items() if word != "properties"}
        return {**_standard(rest), "properties": inner}
    named = {_BOUNDS.get(word, word): part if word == "default" else _standard(part) for word, part in schema.items()}
    # Below both `minimum` and `exclusiveMinimum`, the latter says it all.
    if named.get("minimum", math.inf) <= named.get("exclusiveMinimum", -math.inf):
        del named["minimum"]
    return named


def _kind(schema: dict[str, Any]) -> str:
    """Return a JSON schema in a few words."""
    if "$ref" in schema:
        return "mapping"
    if "oneOf" in schema:
        return " or ".join(dict.fromkeys(_kind(part) for part in schema["oneOf"]))
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_kind(part) for part in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    words = {"string": "text", "integer": "whole number", "boolean": "true | false", "object": "mapping"}
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        inner = schema.get("items") or {}
        return f"list of {_kind(inner)}" if inner else "list"
    return words.get(kind, kind)
