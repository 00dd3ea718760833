"""A conversation as the model was trained to read it, kept beside its weights: a changed template or tokenizer shows.

The conversation is a fixed one, not a row: a model is given away, its training data often may not be.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.data.template import render
from ftune.errors import Problem, RunError
from ftune.plugin import RowError, Turn

TODAY = "2025-01-31"
"""Some templates write the date; the sample must not change with it."""
_TEXT = "Caf\u00e9 12.5 \u2014  the  end\n\n\tif x != y:\n"
"""Letters beyond ASCII, runs of blanks, digits: what tokenizers disagree about."""

_SYSTEM = Turn("system", "Answer briefly.")
_ASKED = (Turn("user", f"Weather?\n{_TEXT}x"), Turn("assistant", "Where?"), Turn("user", "In Rome."))
_CALL: dict[str, Any] = {"name": "weather", "arguments": {"city": "Rome"}}
_CALLED = (
    Turn("assistant", "", extra={"tool_calls": [{"id": "call00001", "type": "function", "function": _CALL}]}),
    Turn("tool", "18 C", extra={"name": "weather", "tool_call_id": "call00001"}),
)
_ANSWER = Turn("assistant", "It is 18 C.")
_FUNCTION = {
    "name": "weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_TOOLS = ({"type": "function", "function": _FUNCTION},)
_CONVERSATIONS: tuple[tuple[tuple[Turn, ...], tuple[Any, ...]], ...] = (
    ((_SYSTEM, *_ASKED, *_CALLED, _ANSWER), _TOOLS),
    ((*_ASKED, *_CALLED, _ANSWER), _TOOLS),
    ((_SYSTEM, *_ASKED, _ANSWER), ()),
    ((*_ASKED, _ANSWER), ()),
    ((_ASKED[0], _ANSWER), ()),
    ((_ASKED[0],), ()),
)
"""The richest that the template accepts is taken."""


def write(folder: Path, tokenizer: Any, *, plain: bool) -> None:
    """Write what the tokenizer makes of the sample; nothing where its template refuses every conversation."""
    if plain or not tokenizer.chat_template:
        asked: dict[str, Any] = {"text": _TEXT}
        _write(folder, {"templated": False, **asked, **_made(tokenizer, asked)})
        return
    for turns, tools in _CONVERSATIONS:
        asked = {"messages": [turn.as_message() for turn in turns], "tools": list(tools)}
        try:
            made = _made(tokenizer, asked)
        except RowError:
            continue
        # Some templates take every role and write only those they know.
        told = [turn.content for turn in turns if turn.role in ("system", "tool")] + [_CALL["name"] for _ in tools]
        if all(text in made["rendered"][0] for text in told):
            _write(folder, {"templated": True, "today": TODAY, **asked, **made})
            return


def check(folder: Path, tokenizer: Any) -> None:
    """Raise RunError where a folder's tokenizer makes something else of the sample than the run did."""
    known = _read(folder)
    if known is None:
        return
    try:
        made = _made(tokenizer, known)
    except RowError as error:
        raise _changed(folder, error.what) from error
    if difference := _difference(tokenizer, known, made):
        raise _changed(folder, difference)


def copy(source: Path, target: Path) -> None:
    """Take the sample along to a folder made of another."""
    path = source / rundir.TEMPLATE_SAMPLE
    if path.is_file():
        rundir.write_text(target / rundir.TEMPLATE_SAMPLE, path.read_text(encoding="utf-8"))


def reads_plain_text(folder: Path) -> bool:
    """Return whether a folder's model is known to have learned plain text, whatever template lies beside it."""
    known = _read(folder)
    return known is not None and not known["templated"]


def _made(tokenizer: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the text of the sample, with and without the heading of an answer, its tokens, and the hash of each."""
    if "messages" in asked:
        if not tokenizer.chat_template:
            raise RowError("the tokenizer has no chat template")
        today = asked.get("today", TODAY)
        turns = [_turn(message) for message in asked["messages"]]
        questions = turns[:-1] if turns[-1].role == "assistant" else turns
        texts = [
            render(tokenizer, turns, asked["tools"], today=today),
            render(tokenizer, questions, asked["tools"], add_generation_prompt=True, today=today),
        ]
    else:
        texts = [asked["text"]]
    ids = [tokenizer(text, add_special_tokens="messages" not in asked)["input_ids"] for text in texts]
    return {
        "rendered": texts,
        "input_ids": ids,
        "rendered_sha256": _hash(texts),
        "input_ids_sha256": _hash(ids),
    }


def _turn(message: dict[str, Any]) -> Turn:
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return Turn(message["role"], message["content"], extra=rest)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("ascii")).hexdigest()


def _write(folder: Path, sample: dict[str, Any]) -> None:
    rundir.write_text(folder / rundir.TEMPLATE_SAMPLE, json.dumps(sample, indent=1) + "\n")


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / rundir.TEMPLATE_SAMPLE
    if not path.is_file():
        return None  # made by other tools, or by an ftune that wrote none
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        for key in ("rendered", "input_ids"):
            if _hash(known[key]) != known[f"{key}_sha256"]:
                raise ValueError(f"`{key}` does not have the hash that stands beside it")
        if ("messages" if known["templated"] else "text") not in known:
            raise ValueError("it holds no conversation")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why, fix = f"{type(error).__name__}: {error}", f"restore `{path}` from a copy, or delete it"
        raise RunError(Problem("run-damaged", f"`{path}` cannot be read", why=why, fix=fix)) from None
    return dict(known)


def _difference(tokenizer: Any, known: dict[str, Any], made: dict[str, Any]) -> str:
    """Return the first place where text or tokens differ, in words; nothing where they are the same."""
    for old, new in zip(known["rendered"], made["rendered"], strict=True):
        if (at := _first_difference(old, new)) is not None:
            begin, end = max(0, at - 20), at + 20
            return f"at character {at} the run wrote {old[begin:end]!r}, the folder now has {new[begin:end]!r}"
    for old, new in zip(known["input_ids"], made["input_ids"], strict=True):
        if (at := _first_difference(old, new)) is not None:
            was, found = ([*row, None][at] for row in (old, new))
            now = tokenizer.convert_ids_to_tokens(found) if found is not None else "nothing"
            return f"the text is the same, but token {at} was {was} and is {found} (`{now}`) by the folder's tokenizer"
    return ""


def _first_difference(old: Any, new: Any) -> int | None:
    pairs: Iterator[tuple[Any, Any]] = itertools.zip_longest(old, new)
    return next((at for at, (was, found) in enumerate(pairs) if was != found), None)


def _changed(folder: Path, why: str) -> RunError:
    what = f"the template or tokenizer in `{folder}` is not the one the model was trained with"
    fix = (
        "restore chat_template.jinja, tokenizer.json and tokenizer_config.json there from a copy; "
        f"if the change is meant, delete {rundir.TEMPLATE_SAMPLE} beside them"
    )
    return RunError(Problem("template-changed", what, why=why, fix=fix))
