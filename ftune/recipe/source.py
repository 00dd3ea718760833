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
_LINE_END = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
"""As PyYAML counts lines."""
_LONGEST_INTEGER = 400
"""Digits; Python refuses to read more than some thousand, and no key takes more than 19."""
_DEEPEST, _LARGEST = 20, 20_000
"""Levels and nodes of a recipe: aliases of aliases can make a few lines into more than a memory holds, and the largest
recipe must still be read in well under a second."""


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
    problems: tuple[Problem, ...] = ()
    """What is wrong with the arguments of `--set`: told together with the rest."""

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
    if _INTEGER.fullmatch(text) and len(text) <= _LONGEST_INTEGER:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(_SPECIAL[text.lower()]) if text.lower() in _SPECIAL else text


def parse(file: str, text: str) -> Source:
    """Read YAML text; raises RecipeError with the place of what cannot be read."""
    reader = _Reader(file, text)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(reader.syntax_problem(error)) from None
    except yaml.reader.ReaderError as error:
        raise RecipeError(_unreadable_letter(file, text, error)) from None
    except _TooMuchError as error:
        what, mark = error.args
        raise RecipeError(Problem("yaml", what, reader.place(mark))) from None
    data = {} if node is None else reader.build(node, ())
    if not reader.problems and not isinstance(data, dict):
        reader.refuse("a recipe is a set of sections, not " + _kind(data), node, fix=_SHAPE_FIX)
    if reader.problems:
        raise RecipeError(*reader.problems)
    return Source(file, text, data, reader.marks)


def read(path: Path) -> Source:
    """Read a recipe file; raises RecipeError where there is none or it cannot be read."""
    try:
        # Bytes, because text mode would turn Windows line ends into others, and a run keeps its recipe as it was.
        raw = path.read_bytes()
    except FileNotFoundError:
        near = _near_files(path)
        fix = f"did you mean {near}?" if near else "`ftune init` writes one to start from"
        raise RecipeError(Problem("recipe-file", f"there is no file {path}", fix=fix)) from None
    except IsADirectoryError:
        raise RecipeError(_directory_problem(path)) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RecipeError(Problem("recipe-file", f"cannot read {path}", why=why)) from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = Place(str(path), raw.count(b"\n", 0, error.start) + 1)
        what = f"{path} is not UTF-8 text"
        why = f"byte {error.start + 1} of the file is {raw[error.start]:#04x}"
        raise RecipeError(Problem("recipe-file", what, place, why=why, fix="save it as UTF-8")) from None
    return parse(str(path), text)


def _directory_problem(path: Path) -> Problem:
    found = sorted(str(entry) for entry in path.glob("*.y*ml"))
    fix = f"did you mean {' or '.join(found[:3])}?" if found else "name the recipe's file"
    return Problem("recipe-file", f"{path} is a directory", fix=fix)


def _unreadable_letter(file: str, text: str, error: yaml.reader.ReaderError) -> Problem:
    before = text[: error.position]
    line = before.count("\n") + 1
    place = Place(file, line, error.position - before.rfind("\n"))
    letter = f"U+{ord(text[error.position]):04X}" if error.position < len(text) else "one"
    return Problem("yaml", f"the character {letter} cannot stand in YAML", place, fix="remove it")


def written(value: Any) -> str:
    """Return a value as a recipe writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(written(part) for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


_TAG = "tag:yaml.org,2002:"
_KNOWN_TAGS = {"null", "bool", "int", "float", "str", "seq", "map", "timestamp", "value", "merge"}
"""Those PyYAML gives by itself; what a scalar is, `scalar` says."""
_SYNTAX_FIX = "indent with spaces, put a space after each colon, and quote text that holds `: ` or ` #`"
_SHAPE_FIX = "start from `ftune init`, or write `model:`, `data:` and `training:` with their keys below them"


def _near_files(path: Path) -> str:
    import difflib

    folder = path.parent
    names = [found.name for found in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(folder / near[0]) if near else ""


def _kind(value: Any) -> str:
    kinds = {"list": "a list", "str": "text", "int": "a number", "float": "a number", "bool": "a truth value"}
    return kinds.get(type(value).__name__, "nothing")


class _TooMuchError(Exception):
    """What is deeper or longer than any recipe; holds what to say and the mark where."""


class _Loader(yaml.SafeLoader):
    """Composes nodes down to a recipe's depth and length: PyYAML's time grows with the depth's square."""

    depth = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > _DEEPEST + 1 or self.nodes > _LARGEST:
            what = "nested too deeply" if self.depth > _DEEPEST + 1 else "too long"
            raise _TooMuchError(f"this is {what} for a recipe", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    """Builds data from YAML nodes and notes where each key stands."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.lines = _LINE_END.split(text.removeprefix("\ufeff"))
        self.num_nodes = 0
        self.marks: dict[KeyPath, Mark] = {}
        self.problems: list[Problem] = []

    def place(self, mark: Any, end: Any = None) -> Place:
        text = self.lines[mark.line] if mark.line < len(self.lines) else ""
        stop = end.column if end is not None and end.line == mark.line else len(text.split(" #")[0].rstrip())
        return Place(self.file, mark.line + 1, mark.column + 1, text, max(1, stop - mark.column))

    def refuse(self, what: str, node: Any, *, fix: str = "") -> None:
        self.problems.append(Problem("yaml", what, self.place(node.start_mark, node.end_mark), fix=fix))

    def syntax_problem(self, error: yaml.MarkedYAMLError) -> Problem:
        mark = error.problem_mark or error.context_mark
        what, fix = error.problem or "cannot be read", _SYNTAX_FIX
        if "'\\t'" in what:
            what, fix = "a tab stands where only spaces may", "indent with spaces"
        elif "found another document" in what:
            what, fix = "there is a second document below `---`", "one recipe, one file: remove the `---`"
        place = self.place(mark) if mark is not None else Place(self.file)
        return Problem("yaml", f"this is not YAML: {what}", place, why=error.context or "", fix=fix)

    def build(self, node: Any, path: KeyPath) -> Any:
        self.num_nodes += 1
        if len(path) > _DEEPEST or self.num_nodes > _LARGEST:
            if not self.problems:
                self.refuse("this is nested too deeply for a recipe, or repeats itself by an alias", node)
            return None
        if node.tag.removeprefix(_TAG) not in _KNOWN_TAGS:
            name = node.tag.replace(_TAG, "!!")
            self.refuse(f"the tag {name} means nothing in a recipe", node, fix="remove it")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.item(child, (*path, index)) for index, child in enumerate(node.value)]
        return scalar(node.value) if node.style is None else node.value

    def item(self, node: Any, path: KeyPath) -> Any:
        place = self.place(node.start_mark, node.end_mark)
        self.marks[path] = Mark(place, place)
        return self.build(node, path)

    def mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse("a key must be a plain word", key_node, fix="write `key: value`")
                continue
            key = key_node.value
            here = (*path, key)
            key_place = self.place(key_node.start_mark, key_node.end_mark)
            if key in result:
                first = self.marks[here].key
                what = f"`{key}` is given twice"
                self.problems.append(
                    Problem(
                        "duplicate-key", what, key_place, "again here", fix="keep one", also=((first, "first here"),)
                    )
                )
                continue
            empty = value_node.start_mark.index == value_node.end_mark.index
            value_place = key_place if empty else self.place(value_node.start_mark, value_node.end_mark)
            self.marks[here] = Mark(key_place, value_place)
            result[key] = self.build(value_node, here)
        return result
