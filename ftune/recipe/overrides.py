"""`--set section.key=value`: the command line's say over the recipe, with problems that point at the argument."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ftune.errors import Place, Problem, RecipeError
from ftune.recipe import source as sources
from ftune.recipe.source import Mark, Source

_FORM = "write it as --set training.learning_rate=1e-4"


def apply(source: Source, overrides: Sequence[str]) -> Source:
    """Return the source with every override in it; raises RecipeError for arguments that cannot be read."""
    if not overrides:
        return source
    data = copy.deepcopy(source.data)
    marks = dict(source.marks)
    problems: list[Problem] = []
    keys = []
    for number, argument in enumerate(overrides, start=1):
        file = f"--set #{number}"
        path, equals, text = argument.partition("=")
        parts = tuple(part.strip() for part in path.split("."))
        if not equals or len(parts) < 2 or not all(parts):
            place = Place(file, text=argument, column=1, length=max(1, len(path)))
            problems.append(Problem("override", f"`{argument}` is not section.key=value", place, fix=_FORM))
            continue
        key_place = Place(file, text=argument, column=1, length=len(path))
        value_place = Place(file, text=argument, column=len(path) + 2, length=max(1, len(text)))
        try:
            value = sources.parse(file, "value: " + text).data["value"]
        except RecipeError as error:
            problems.append(Problem("override", error.problems[0].what, value_place, fix="quote the value"))
            continue
        target = data
        for part in parts[:-1]:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[parts[-1]] = value
        for path_in in [known for known in marks if known[: len(parts)] == parts]:
            del marks[path_in]
        marks[parts] = Mark(key_place, value_place)
        if isinstance(value, list):
            marks.update({(*parts, index): Mark(value_place, value_place) for index in range(len(value))})
        keys.append(".".join(parts))
    if problems:
        raise RecipeError(*problems)
    return Source(source.file, source.text, data, marks, frozenset(keys))


def as_yaml(overrides: Sequence[str]) -> str:
    """Return the text of `overrides.yaml`: the arguments, in order."""
    import json

    return "".join(f"- {json.dumps(argument, ensure_ascii=False)}\n" for argument in overrides)
