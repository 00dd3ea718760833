"""A recipe's text as data, with the position of every key and value.

YAML 1.2 scalars: `2e-4` is a number, `no` is text, `012` is 12; duplicate keys and custom tags are refused. PyYAML's
own loaders read YAML 1.1, where each of these is otherwise (measured with 6.0.3).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ftune.errors import Place, Problem, RecipeError

KeyPath = tuple[str | int, ...]

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


@dataclass(frozen=True)
class Mark:
    """Where a key stands and where its value stands; lines and columns count from 1."""

    key: Place
    value: Place


@dataclass(frozen=True)
class Source:
    """A recipe as written: its data and where each part of it stands."""

    file: str
    text: str
    data: dict[str, Any]
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()
    """Dotted keys that `--set` gave."""

    def key(self, path: KeyPath) -> Place:
        """Return the place of a key, or of the nearest section around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.marks:
                return self.marks[path[:length]].key
        return Place(self.file)

    def value(self, path: KeyPath) -> Place:
        """Return the place of a value, or of the nearest key around it."""
        return self.marks[path].value if path in self.marks else self.key(path)


def scalar(text: str) -> Any:
    """Return what a plain YAML 1.2 scalar means."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(_SPECIAL[text.lower()]) if text.lower() in _SPECIAL else text


def parse(file: str, text: str, *, first_line: int = 1, shown: str | None = None) -> Source:
    """Read YAML text; raises RecipeError with the place of what cannot be read."""
    reader = _Reader(file, (shown or text).splitlines(), first_line)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(reader.syntax_problem(error)) from None
    except yaml.YAMLError as error:
        raise RecipeError(Problem("yaml", "this is not readable text", Place(file), why=str(error))) from None
    data = {} if node is None else reader.build(node, ())
    if not reader.problems and not isinstance(data, dict):
        reader.refuse("yaml", "a recipe is a set of sections, not a " + _kind(data), node, fix=_SHAPE_FIX)
    if reader.problems:
        raise RecipeError(*reader.problems)
    return Source(file, text, data, reader.marks)


def read(path: Path) -> Source:
    """Read a recipe file; raises RecipeError where there is none or it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = _near_files(path)
        fix = f"did you mean {near}?" if near else "`ftune init` writes one to start from"
        raise RecipeError(Problem("recipe-file", f"there is no file {path}", fix=fix)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(Problem("recipe-file", f"cannot read {path}", why=str(error))) from None
    return parse(str(path), text)


_SHAPE_FIX = "start from `ftune init`, or write `model:`, `data:` and `training:` with their keys below them"


def _near_files(path: Path) -> str:
    import difflib

    folder = path.parent
    names = [found.name for found in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(folder / near[0]) if near else ""


def _kind(value: Any) -> str:
    return {"list": "list", "str": "text", "int": "number", "float": "number", "bool": "truth value"}.get(
        type(value).__name__, "nothing" if value is None else "mapping"
    )


class _Reader:
    """Builds data from YAML nodes and notes where each key stands."""

    def __init__(self, file: str, lines: list[str], first_line: int) -> None:
        self.file = file
        self.lines = lines
        self.first_line = first_line
        self.marks: dict[KeyPath, Mark] = {}
        self.problems: list[Problem] = []

    def place(self, mark: Any, end: Any = None) -> Place:
        text = self.lines[mark.line] if mark.line < len(self.lines) else ""
        stop = end.column if end is not None and end.line == mark.line else len(text.split(" #")[0].rstrip())
        return Place(self.file, mark.line + self.first_line, mark.column + 1, text, max(1, stop - mark.column))

    def refuse(self, rule: str, what: str, node: Any, **more: str) -> None:
        self.problems.append(Problem(rule, what, self.place(node.start_mark, node.end_mark), **more))

    def syntax_problem(self, error: yaml.MarkedYAMLError) -> Problem:
        mark = error.problem_mark or error.context_mark
        what = (error.problem or "cannot be read").replace("found character '\\t' that", "a tab")
        return Problem(
            "yaml",
            f"this is not YAML: {what}",
            self.place(mark) if mark is not None else Place(self.file),
            why=error.context or "",
            fix="indent with spaces, put a space after each colon, and quote text that holds `: ` or ` #`",
        )

    def build(self, node: Any, path: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.item(child, (*path, index)) for index, child in enumerate(node.value)]
        if node.style is None and node.tag.startswith("tag:yaml.org,2002:"):
            return scalar(node.value)
        if not node.tag.startswith("tag:yaml.org,2002:"):
            self.refuse("yaml", f"tags such as {node.tag} mean nothing in a recipe", node, fix="remove the tag")
        return node.value

    def item(self, node: Any, path: KeyPath) -> Any:
        place = self.place(node.start_mark, node.end_mark)
        self.marks[path] = Mark(place, place)
        return self.build(node, path)

    def mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse("yaml", "a key must be a plain word", key_node)
                continue
            key = key_node.value
            here = (*path, key)
            key_place = self.place(key_node.start_mark, key_node.end_mark)
            if key in result:
                first = self.marks[here].key
                what = f"`{key}` is given twice"
                self.problems.append(
                    Problem("duplicate-key", what, key_place, "again here", fix="keep one", also=((first, "first here"),))
                )
                continue
            empty = value_node.start_mark.index == value_node.end_mark.index
            value_place = key_place if empty else self.place(value_node.start_mark, value_node.end_mark)
            self.marks[here] = Mark(key_place, value_place)
            result[key] = self.build(value_node, here)
        return result
