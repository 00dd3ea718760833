"""Two answers to one prompt, of which one is preferred."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from ftune.formats import (
    asked_turns,
    kind_of,
    missing,
    refuse_chat_columns,
    tools_of,
    turns_of,
    untrained,
    with_system,
)
from ftune.plugin import Conversation, Finding, Format, RowError, Turn

_ANSWERS = ("chosen", "rejected")
_PROMPTS_ELSEWHERE = ("question", "instruction", "input", "query")
"""What a prompt is called where it is not called `prompt`."""
_MARGIN = 3
"""An answer so many times as long as the other may be told by its length alone."""

Answers = tuple[tuple[Turn, ...], ...]


class Preference(Format):
    """Three texts are joined as they are, without a chat template; messages are two conversations with one prompt.

    Where there is no `prompt`, or only a text beside whole conversations, it is what both have in common: turns up to
    an answer, or whole words. Columns other than these, `system` and `tools` are ignored: `score_chosen`, `margin`, ...
    """

    name: ClassVar[str] = "preference"
    summary: ClassVar[str] = "A prompt with a chosen and a rejected answer, as texts or as messages."
    columns: ClassVar[str] = '{"prompt": ..., "chosen": ..., "rejected": ...}'
    views: ClassVar[tuple[str, ...]] = _ANSWERS
    findings: ClassVar[tuple[Finding, ...]] = (
        Finding(
            "chosen-is-rejected",
            "have the same answer as chosen and as rejected",
            "where there is nothing to prefer, nothing is learned",
            "remove them",
        ),
        Finding(
            "no-prompt",
            "have no prompt",
            "their two answers share no beginning, so nothing says what they answer",
            "add `prompt`",
        ),
        Finding(
            "length-margin",
            f"have one answer more than {_MARGIN} times as long as the other",
            "length alone tells such answers apart: a model may learn to be long or short instead of good",
            "look whether most of them lean the same way",
            severity="note",
        ),
    )
    loss_setting: ClassVar[str] = "completion_only_loss"
    templated: ClassVar[bool | None] = None

    def detect(self, row: Mapping[str, Any]) -> bool:
        return all(key in row for key in _ANSWERS)

    def read(self, row: Mapping[str, Any]) -> Conversation:
        return self.read_views(row)[0]

    def read_views(self, row: Mapping[str, Any]) -> tuple[Conversation, ...]:
        for key in _ANSWERS:
            if key not in row:
                raise missing(key, row)
        prompt, chosen, rejected = (row.get(key) for key in ("prompt", *_ANSWERS))
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise RowError(
                f"`chosen` is {kind_of(chosen)} but `rejected` is {kind_of(rejected)}",
                "write both as text or both as lists of messages",
            )
        if isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
            refuse_chat_columns(row)
            if prompt is None:
                _refuse_other_prompt(row, chosen)
                at = _shared_text(chosen, rejected)
                prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
            return tuple(Conversation(prompt=prompt, completion=text) for text in (chosen, rejected))
        asked, answers = _conversation(row)
        asked = with_system(untrained(asked), row)
        return tuple(Conversation(turns=asked + turns, tools=tools_of(row)) for turns in answers)

    def remarks(self, views: tuple[Conversation, ...]) -> Iterable[str]:
        said = [_said(view) for view in views]
        if said[0] == said[1]:
            yield "chosen-is-rejected"
        if not _asked(views[0]).strip():
            yield "no-prompt"
        short, long = sorted(len(_answer(view)) for view in views)
        # An empty answer is the audit's own finding.
        if 0 < short * _MARGIN < long:
            yield "length-margin"


def _conversation(row: Mapping[str, Any]) -> tuple[tuple[Turn, ...], Answers]:
    """Return the prompt's turns and those of each answer."""
    prompt = row.get("prompt")
    answers: Answers = tuple(
        (Turn("assistant", row[key]),) if isinstance(row[key], str) else turns_of(row[key], key) for key in _ANSWERS
    )
    bare = all(turns[0].role == "assistant" for turns in answers)
    if isinstance(prompt, str) and bare:
        return (Turn("user", prompt),), answers
    if prompt is None and bare:
        _refuse_other_prompt(row, "")
    if prompt is None or isinstance(prompt, str):
        at = _shared_turns(*answers)
        return answers[0][:at], tuple(turns[at:] for turns in answers)
    asked = asked_turns(prompt)
    if all(_common_turns(turns, asked) == len(asked) for turns in answers):
        answers = tuple(turns[len(asked) :] for turns in answers)
    for key, turns in zip(_ANSWERS, answers, strict=True):
        if not turns:
            raise RowError(f"`{key}` holds the prompt but no answer", "add the assistant's message")
        if turns[0].role != "assistant":
            what = f"`{key}` goes on after `prompt` with a message of `{turns[0].role}`, not of the assistant"
            raise RowError(what, "let it begin with the answer, or leave `prompt` out")
    return asked, answers


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return with how many equal things both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _common_turns(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """Return with how many equal messages both begin; whether they are trained makes no difference."""
    return _common([turn.as_message() for turn in one], [turn.as_message() for turn in other])


def _shared_turns(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> int:
    """Return how many turns are the prompt of both; both go on with an answer."""
    at = _common_turns(chosen, rejected)
    if at < min(len(chosen), len(rejected)):
        if {chosen[at].role, rejected[at].role} != {"assistant"}:
            what = f"`chosen[{at}]` and `rejected[{at}]` differ, but are not both the assistant's"
            raise RowError(what, "let both be the same up to the answer")
        return at
    # One is the beginning of the other: what it ends with is its answer.
    if chosen[at - 1].role != "assistant":
        shorter = _ANSWERS[len(rejected) < len(chosen)]
        raise RowError(f"`{shorter}` ends before an answer", "end it with the assistant's message")
    return at - 1


def _shared_text(chosen: str, rejected: str) -> int:
    """Return where the common prompt of two texts ends: before a word, and before the blank that leads to it."""
    at = _common(chosen, rejected)
    if at == min(len(chosen), len(rejected)):
        # One is the beginning of the other: its last word is left over to answer with.
        at = len(chosen[:at].rstrip())
        while at and not chosen[at - 1].isspace():
            at -= 1
    elif _in_word(chosen[at]) or _in_word(rejected[at]):
        while at and _in_word(chosen[at - 1]):
            at -= 1
    # Tokenizers write a blank as the beginning of the word that follows.
    return at - 1 if chosen[at - 1 : at] == " " else at


def _in_word(letter: str) -> bool:
    """Return whether a letter belongs to those around it; scripts written without blanks have words of one letter."""
    wide = unicodedata.east_asian_width(letter) in "WF"
    return bool(unicodedata.combining(letter)) or (letter.isalnum() and not wide)


def _refuse_other_prompt(row: Mapping[str, Any], chosen: str) -> None:
    """Raise RowError where the prompt stands in a column of another name and would be lost."""
    for key in _PROMPTS_ELSEWHERE:
        value = row.get(key)
        if isinstance(value, str) and value.strip() not in chosen:
            raise RowError(f"the row has no `prompt`, but `{key}`", f"rename `{key}` to `prompt`")


def _asked(view: Conversation) -> str:
    before = itertools.takewhile(lambda turn: not turn.trained, view.turns)
    return view.prompt + "".join(turn.content for turn in before if turn.role != "system")


def _answer(view: Conversation) -> str:
    return view.completion + "".join(turn.content for turn in view.turns if turn.role == "assistant" and turn.trained)


def _said(view: Conversation) -> list[Any]:
    return [view.completion.strip(), *({**turn.as_message(), "content": turn.content.strip()} for turn in view.turns)]


plugin = Preference()
