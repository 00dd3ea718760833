"""A recipe's text with other values: what is not changed stays as it was, letter for letter.

Values are exchanged at the positions where PyYAML saw them. What comes out is read again and compared with what was
meant, so that a text which cannot be edited this way (aliases, several keys merged into one) is refused, not damaged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from ftune.errors import Problem, RecipeError
from ftune.recipe import mapping, source

Values = Mapping[str, Any]
"""Dotted keys and their values; REMOVED takes a key out. A section by itself is exchanged key by key."""


class _Removed:
    def __repr__(self) -> str:
        return "removed"


REMOVED = _Removed()


def edited(file: str, text: str, values: Values) -> str:
    """Return the text with the values in it; raises RecipeError where the text cannot be edited by position."""
    for key, value in values.items():
        path = tuple(key.split("."))
        before = source.parse(file, text).data
        for where, what in _leaves(value_at(before, path), path, value):
            text = _with(text, where, what)
        meant = _put(copy.deepcopy(before), path, value)
        try:
            found: Any = source.parse(file, text).data
        except RecipeError as error:
            found = error
        if _without_empty(found) != _without_empty(meant):
            what = f"`{key}` cannot be changed in this file's text"
            fix = f"write {key}: {flow(value)} by hand, without aliases or tags around it"
            raise RecipeError(Problem("recipe-edit", what, fix=fix))
    return text


def flow(value: Any) -> str:
    """Return a value as it may stand anywhere in a recipe, on one line."""
    return mapping.on_one_line(value)


def value_at(data: Any, path: Iterable[str]) -> Any:
    """Return what lies at a path of keys; None where nothing does."""
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _leaves(before: Any, path: tuple[str, ...], value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Return what changes below a path: a mapping in place of another changes key by key."""
    if not isinstance(value, Mapping) or not isinstance(before, dict) or not before or not value:
        return [(path, value)]
    gone = [((*path, key), REMOVED) for key in before if key not in value]
    changed = [
        leaf
        for key, item in value.items()
        if key not in before or before[key] != item
        for leaf in _leaves(before.get(key), (*path, key), item)
    ]
    return [*changed, *gone]


def _put(data: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    target = data
    for part in path[:-1]:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    if value is REMOVED:
        target.pop(path[-1], None)
    else:
        target[path[-1]] = value
    return data


def _without_empty(data: Any) -> Any:
    """Return data without mappings that hold nothing, which mean the same as none."""
    if not isinstance(data, dict):
        return data
    kept = {key: _without_empty(value) for key, value in data.items()}
    return {key: value for key, value in kept.items() if value != {} and value is not None}


def _with(text: str, path: tuple[str, ...], value: Any) -> str:
    """Return the text with one value exchanged, added or taken out."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is None:
        return _ended(text) + _block(path, value)
    for depth, part in enumerate(path):
        if not isinstance(node, yaml.MappingNode):
            return text if value is REMOVED else _in_place_of(text, node, path[depth:], value)
        found = next((pair for pair in node.value if pair[0].value == part), None)
        if found is None:
            return text if value is REMOVED else _added(text, node, path[depth:], value, top=depth == 0)
        if depth == len(path) - 1:
            return _removed(text, node, found) if value is REMOVED else _exchanged(text, found, value)
        node = found[1]
    raise AssertionError("a path has a last part")


def _exchanged(text: str, pair: tuple[Any, Any], value: Any) -> str:
    key, node = pair
    if _is_empty(node) or (isinstance(node, yaml.CollectionNode) and not node.flow_style):
        # A block's own line may be indented as little as its key, where a value on one line may not stand.
        colon = text.index(":", key.end_mark.index) + 1
        return f"{text[:colon]} {flow(value)}{text[max(colon, _end(text, node)) :]}"
    return text[: node.start_mark.index] + flow(value) + text[_end(text, node) :]


def _in_place_of(text: str, node: Any, rest: tuple[str, ...], value: Any) -> str:
    """Return the text where a section is empty, or no section: its first key, in the section's own style."""
    if _is_empty(node):
        start = node.start_mark.index
        line = text[text.rfind("\n", 0, start) + 1 : start]
        indent = len(line) - len(line.lstrip()) + 2
        end = _end_of_line(text, start)
        return text[:end] + _newline(text) + _block(rest, value, indent).rstrip("\n") + text[end:]
    return text[: node.start_mark.index] + flow(_nested(rest, value)) + text[_end(text, node) :]


def _added(text: str, node: Any, rest: tuple[str, ...], value: Any, *, top: bool) -> str:
    """Return the text with a further key in a mapping."""
    if node.flow_style:
        inner = flow(_nested(rest, value))[1:-1]
        if not node.value:
            return text[: node.start_mark.index + 1] + inner + text[node.end_mark.index - 1 :]
        end = _end(text, node.value[-1][1]) if not _is_empty(node.value[-1][1]) else node.value[-1][1].end_mark.index
        return f"{text[:end]}, {inner}{text[end:]}"
    indent = node.start_mark.column
    lines = _block(rest, value, indent).replace("\n", _newline(text))
    if top:
        end = node.end_mark.index
        return _ended(text[:end], _newline(text)) + lines + text[end:]
    end = _end_of_line(text, _end(text, node))
    return _ended(text[:end], _newline(text)) + lines.rstrip("\r\n") + (text[end:] or _newline(text))


def _removed(text: str, parent: Any, pair: tuple[Any, Any]) -> str:
    key, node = pair
    start, end = key.start_mark.index, max(_end(text, node), key.end_mark.index)
    if not parent.flow_style:
        start = text.rfind("\n", 0, start) + 1
        end = _end_of_line(text, end)
        return text[:start] + text[end:].removeprefix("\r").removeprefix("\n")
    place = parent.value.index(pair)
    if place + 1 < len(parent.value):
        return text[:start] + text[parent.value[place + 1][0].start_mark.index :]
    before = _end(text, parent.value[place - 1][1]) if place else start
    return text[:before] + text[end:]


def _is_empty(node: Any) -> bool:
    return bool(node.start_mark.index == node.end_mark.index)


def _end(text: str, node: Any) -> int:
    """Return where a value's last letter is: a block's own end mark lies behind the remarks after it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        if isinstance(last, tuple):
            return max(_end(text, last[1]), _colon(text, last[0])) if _is_empty(last[1]) else _end(text, last[1])
        return _end(text, last)
    start: int = node.start_mark.index
    end: int = node.end_mark.index
    return start + len(text[start:end].rstrip())


def _colon(text: str, key: Any) -> int:
    return text.index(":", key.end_mark.index) + 1


def _end_of_line(text: str, start: int) -> int:
    found = [place for place in (text.find("\n", start), text.find("\r\n", start)) if place >= 0]
    return min(found, default=len(text))


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _ended(text: str, newline: str = "\n") -> str:
    return text if not text or text.endswith("\n") else text + newline


def _nested(path: tuple[str, ...], value: Any) -> Any:
    for part in reversed(path):
        value = {part: value}
    return value


def _block(path: tuple[str, ...], value: Any, indent: int = 0) -> str:
    """Return lines for a path: each part on its own line, two blanks deeper; mappings of a section as its lines."""
    first, *rest = path
    blanks = " " * indent
    if rest:
        return f"{blanks}{first}:\n" + _block(tuple(rest), value, indent + 2)
    if indent == 0 and isinstance(value, Mapping) and value:
        return f"{first}:\n" + "".join(f"  {key}: {flow(item)}\n" for key, item in value.items())
    return f"{blanks}{first}: {flow(value)}\n"
