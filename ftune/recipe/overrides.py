"""`--set section.key=value`: the command line's say over the recipe, with problems that point at the argument."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ftune.errors import Place, Problem, RecipeError
from ftune.recipe import source as sources
from ftune.recipe.source import KeyPath, Mark, Source

_BEFORE_VALUE = 5
"""Tokens of `value:`: the stream, the mapping, the key, its name and the colon."""
_ENDS = (yaml.BlockEndToken, yaml.StreamEndToken)
_FORM = "write it as --set training.learning_rate=1e-4"


@dataclass(frozen=True)
class _Argument:
    """One `--set`, read."""

    parts: tuple[str, ...]
    value: Any
    mark: Mark


def apply(source: Source, overrides: Sequence[str]) -> Source:
    """Return the source with every override in it; its `problems` tell of arguments that cannot be read."""
    if not overrides:
        return source
    data = copy.deepcopy(source.data)
    marks = dict(source.marks)
    problems: list[Problem] = []
    given: list[str] = []
    for number, text in enumerate(overrides, start=1):
        argument = _read(number, text)
        problem = argument if isinstance(argument, Problem) else _put(data, argument)
        if isinstance(problem, Problem):
            problems.append(problem)
            continue
        assert isinstance(argument, _Argument)
        marks = {path: mark for path, mark in marks.items() if path[: len(argument.parts)] != argument.parts}
        marks |= _marks(argument)
        given.append(".".join(argument.parts))
    return Source(source.file, source.text, data, marks, frozenset(given), (*source.problems, *problems))


def as_yaml(overrides: Sequence[str]) -> str:
    """Return the text of `overrides.yaml`: the arguments, in order."""
    import json

    return "".join(f"- {json.dumps(argument, ensure_ascii=False)}\n" for argument in overrides)


def _read(number: int, text: str) -> _Argument | Problem:
    path, equals, written = text.partition("=")
    key = Place(f"--set #{number}", None, 1, text, max(1, len(path)))
    parts = tuple(part.strip() for part in path.split("."))
    if not equals or len(parts) < 2 or not all(parts):
        return Problem("override", f"`{text}` is not section.key=value", key, fix=_FORM)
    place = Place(key.file, None, len(path) + 2, text, max(1, len(written)))
    try:
        value = _value(key.file, written)
    except RecipeError as error:
        why = error.problems[0].what
        fix = f"quote the value: --set '{path}=\"...\"'"
        return Problem("override", f"the value of `{path}` cannot be read", place, why=why, fix=fix)
    return _Argument(parts, value, Mark(key, place))


def _value(file: str, written: str) -> Any:
    """Return what an argument's text means in YAML; raises RecipeError where YAML would leave a part of it out."""
    text = "value: " + written
    data = sources.parse(file, text).data
    if list(data) != ["value"]:
        raise RecipeError(Problem("override", "a second key begins on another line"))
    tokens = list(yaml.scan(text, Loader=yaml.SafeLoader))
    ends = [0, *(token.end_mark.index for token in tokens)]
    gaps = [text[end : token.start_mark.index] for end, token in zip(ends, tokens, strict=False)]
    if any(isinstance(token, (yaml.DocumentStartToken, yaml.DocumentEndToken)) for token in tokens):
        raise RecipeError(Problem("override", "a line of it ends the value"))
    if not any("#" in gap for gap in gaps):
        return data["value"]
    # In a file ` #` begins a remark; on a command line it is a part of a name.
    value = [token for token in tokens[_BEFORE_VALUE:] if not isinstance(token, _ENDS)]
    if "\n" in written or (value and not (len(value) == 1 and getattr(value[0], "plain", False))):
        raise RecipeError(Problem("override", "` #` begins a remark in YAML, and would end the value"))
    return sources.scalar(written.strip())


def _put(data: dict[str, Any], argument: _Argument) -> Problem | None:
    """Write a value into the data, making the mappings on the way to it."""
    target = data
    for depth, part in enumerate(argument.parts[:-1], start=1):
        if target.get(part) is None:
            target[part] = {}
        if not isinstance(target[part], dict):
            above = ".".join(argument.parts[:depth])
            fix = f"set all of it: --set '{above}=...'"
            return Problem("override", f"`{above}` is a value: it has no keys below it", argument.mark.key, fix=fix)
        target = target[part]
    target[argument.parts[-1]] = argument.value
    return None


def _marks(argument: _Argument) -> dict[KeyPath, Mark]:
    """Return the argument's place for its key and for everything in its value."""
    found: dict[KeyPath, Mark] = {argument.parts: argument.mark}
    value_mark = Mark(argument.mark.value, argument.mark.value)

    def inside(path: KeyPath, value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            here = (*path, key)
            found[here] = value_mark
            inside(here, item)

    inside(argument.parts, argument.value)
    return found
