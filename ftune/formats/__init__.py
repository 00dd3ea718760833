"""How rows on disk are written: a module each, and the checks they share.

The checks live here because formats do not know each other; nothing here knows a format by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ftune.plugin import Conversation, RowError, Turn

_WRONG_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
"""Roles that a chat template would render as strangers, so that nothing the assistant says were learned."""
_KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer", "function")
"""Roles of their own are a template's affair; these are only what a slip of the pen is compared with."""


def keys_of(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in row) or "nothing"


def missing(key: str, row: Mapping[str, Any], place: str = "the row") -> RowError:
    """Return the error for a key that is not there, with the key that was probably meant."""
    near = difflib.get_close_matches(key, [str(other) for other in row], n=1)
    fix = f"did you mean `{near[0]}`? rename it to `{key}`" if near else f"add `{key}`, or set data.format"
    return RowError(f"{place} has no `{key}`; it has {keys_of(row)}", fix)


def text_of(row: Mapping[str, Any], key: str) -> str:
    """Return a column that must be text."""
    if key not in row:
        raise missing(key, row)
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"`{key}` is {kind_of(value)}, not text", f"write `{key}` as text in quotes")
    return value


def optional_text(row: Mapping[str, Any], key: str) -> str:
    """Return a column that may be absent or null."""
    return "" if row.get(key) is None else text_of(row, key)


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def turns_of(value: Any, column: str, *, role_key: str = "role", text_key: str = "content") -> tuple[Turn, ...]:
    """Return a list of messages as turns."""
    if isinstance(value, str):
        raise RowError(f"`{column}` is text, not a list", "write a list of messages, not a string that holds one")
    if not isinstance(value, (list, tuple)):
        raise RowError(f"`{column}` is {kind_of(value)}, not a list of messages")
    if not value:
        raise RowError(f"`{column}` is an empty list", "remove the row")
    return tuple(
        _turn(message, f"{column}[{index}]", role_key=role_key, text_key=text_key)
        for index, message in enumerate(value)
    )


def untrained(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Return turns of which nothing is learned: what comes before the answer."""
    return tuple(dataclasses.replace(turn, trained=False) for turn in turns)


def asked_turns(value: Any) -> tuple[Turn, ...]:
    """Return the messages of `prompt`, which somebody else than the assistant must end."""
    turns = untrained(turns_of(value, "prompt"))
    if turns[-1].role == "assistant":
        what = f"`prompt[{len(turns) - 1}]` is the assistant's, so that nothing is left to answer"
        raise RowError(what, "end `prompt` with what is answered")
    return turns


def with_system(turns: tuple[Turn, ...], row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Return the turns after what the row's `system` says, unless they bring a system message of their own."""
    system = optional_text(row, "system")
    own = bool(turns) and turns[0].role == "system"
    return turns if own or not system.strip() else (Turn("system", system, trained=False), *turns)


def refuse_chat_columns(row: Mapping[str, Any]) -> None:
    """Raise RowError for columns that only a chat template can write, beside plain texts that have none."""
    for key in ("system", "tools"):
        value = row.get(key)
        if value.strip() if isinstance(value, str) else value:
            raise RowError(
                f"`{key}` belongs to conversations, but this row is plain text", "write the texts as lists of messages"
            )


def tools_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the row's tools; Parquet files often hold them as JSON text, since their shapes differ."""
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError("`tools` is text but not JSON", "write a list of tool descriptions") from None
    if not value:
        return ()
    if not isinstance(value, (list, tuple)):
        raise RowError(f"`tools` is {kind_of(value)}, not a list", "write a list of tool descriptions")
    return tuple(value)


def prompt_and_completion(row: Mapping[str, Any]) -> Conversation:
    """Return a prompt and how it goes on: two texts, joined as they are, or two lists of messages."""
    for key in ("prompt", "completion"):
        if key not in row:
            raise missing(key, row)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Conversation(prompt=prompt, completion=completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError(
            f"`prompt` is {kind_of(prompt)} but `completion` is {kind_of(completion)}",
            "write both as text or both as lists of messages",
        )
    return Conversation(turns=untrained(turns_of(prompt, "prompt")) + turns_of(completion, "completion"))


def _meant(role: str) -> str | None:
    """Return the role that was probably meant by a wrong one."""
    if role in _KNOWN_ROLES or role in _WRONG_ROLES:
        return _WRONG_ROLES.get(role)
    near = difflib.get_close_matches(role.strip().lower(), _KNOWN_ROLES, n=1, cutoff=0.75)
    return near[0] if near else None


def _turn(message: Any, place: str, *, role_key: str, text_key: str) -> Turn:
    if not isinstance(message, Mapping):
        raise RowError(f"`{place}` is {kind_of(message)}, not an object with `{role_key}` and `{text_key}`")
    for key in (role_key, text_key):
        # A message that only calls tools may leave its text out.
        if key not in message and not (key == text_key and message.get("tool_calls")):
            raise missing(key, message, f"`{place}`")
    role = message[role_key]
    if not isinstance(role, str):
        raise RowError(f"`{place}.{role_key}` is {kind_of(role)}, not text")
    if role_key == "role" and (meant := _meant(role)):
        raise RowError(f"`{place}.role` is `{role}`", f"did you mean `{meant}`?")
    # Columnar files give every message every key; null stands for "not there".
    extra = {
        key: item
        for key, item in message.items()
        if key not in (role_key, text_key, "weight", "train") and item is not None
    }
    content = _content(message.get(text_key), f"{place}.{text_key}", may_lack=bool(message.get("tool_calls")))
    return Turn(role, content, trained=_trained(message, place), extra=extra)


def _content(value: Any, place: str, *, may_lack: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None and may_lack:
        return ""
    if not isinstance(value, (list, tuple)):
        raise RowError(f"`{place}` is {kind_of(value)}, not text", "remove the message or give it text")
    texts = []
    for index, part in enumerate(value):
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            found = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise RowError(f"`{place}[{index}]` is not a text part but {found}", "only text can be learned from")
    return "".join(texts)


def _trained(message: Mapping[str, Any], place: str) -> bool:
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(f"`{place}.weight` is {weight!r}", "write 0 (not learned) or 1 (learned)")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"`{place}.train` is {train!r}", "write true or false")
    return weight != 0 and train is not False
