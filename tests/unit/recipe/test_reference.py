"""The JSON Schema says what the recipe's own models say, in words that every validator knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftune.recipe.reference import json_schema

_WORDS = {
    *("$schema", "title", "description", "default", "type", "enum", "const", "required"),
    *("properties", "additionalProperties", "items", "prefixItems", "anyOf", "oneOf"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"),
}
"""Those of JSON Schema 2020-12 that a recipe needs."""


def schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Give a schema and all inside it."""
    if not isinstance(schema, dict):
        return
    yield schema
    inner = [*schema.get("anyOf", []), *schema.get("oneOf", []), *schema.get("prefixItems", []), schema.get("items")]
    for part in [*inner, *schema.get("properties", {}).values()]:
        yield from schemas(part)


def test_words_are_those_of_json_schema() -> None:
    found = list(schemas(json_schema()))
    assert len(found) > 100
    assert {word for schema in found for word in schema} - _WORDS == set()


def test_bounds() -> None:
    sections = {name: section.get("properties") for name, section in json_schema()["properties"].items()}
    training, data = sections["training"], sections["data"]
    assert training["weight_decay"]["minimum"] == 0
    assert training["num_train_epochs"]["exclusiveMinimum"] == 0
    assert training["eval_steps"]["anyOf"][0]["exclusiveMinimum"] == 0
    assert training["label_smoothing_factor"]["exclusiveMaximum"] == 1
    assert {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1} in data["eval"]["anyOf"]
