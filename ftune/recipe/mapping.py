"""A recipe given as a mapping, as the text a person would have written: a run keeps its recipe as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from ftune.errors import Problem, RecipeError
from ftune.recipe import source as sources


class _Writer(yaml.SafeDumper):
    """Writes YAML 1.2: text that would be read as a number is quoted, which PyYAML's own rules leave out."""


def _text(writer: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if isinstance(sources.scalar(text), str) else '"'
    return writer.represent_scalar("tag:yaml.org,2002:str", str(text), style=style)


def _path(writer: yaml.SafeDumper, path: PurePath) -> yaml.Node:
    return _text(writer, str(path))


_Writer.add_multi_representer(str, _text)
_Writer.add_representer(str, _text)
_Writer.add_multi_representer(PurePath, _path)


def on_one_line(value: Any) -> str:
    """Return a value as it may stand anywhere in a recipe, also between braces."""
    listed = yaml.dump(
        [value], Dumper=_Writer, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False
    )
    return str(listed).strip()[1:-1]


def source_of(recipe: Mapping[str, Any]) -> sources.Source:
    """Return a mapping as a source; raises RecipeError where it holds what a recipe cannot."""
    try:
        text = yaml.dump(dict(recipe), Dumper=_Writer, sort_keys=False, allow_unicode=True, default_flow_style=False)
    except yaml.representer.RepresenterError as error:
        what = f"a recipe cannot hold a {type(error.args[-1]).__name__}"
        fix = "use mappings, lists, text, numbers, true, false and null"
        raise RecipeError(Problem("recipe-mapping", what, fix=fix)) from None
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        why = str(error) or type(error).__name__
        raise RecipeError(Problem("recipe-mapping", "this mapping cannot be written as a recipe", why=why)) from None
    return sources.parse("recipe", text)
