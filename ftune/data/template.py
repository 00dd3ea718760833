"""A conversation as the chat template writes it, and where in that text the trained answers stand.

Found by prefix difference: what rendering turn i adds to the prompt before it is the answer. `{% generation %}` marks
are never used, since most templates have none and an absent mark silently learns nothing. Templates that write history
anew (Qwen3 drops earlier thinking) break the prefix; there a sentinel in place of the answer finds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from ftune.errors import DataError, Place, Problem
from ftune.plugin import Conversation, RowError, Turn

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A row's whole text and the character spans that count in the loss."""

    text: str
    spans: tuple[Span, ...]
    templated: bool
    """Rendered by a chat template, which writes its own begin and end marks."""


def use_template_file(tokenizer: Any, path: str) -> None:
    """Give the tokenizer another chat template; it is saved with the model from then on."""
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = Problem("unreadable-template", f"cannot read the chat template {path}: {error}", Place(path))
        raise DataError(replace(problem, fix="set data.chat_template to a Jinja file")) from error


def require_template(tokenizer: Any) -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            Problem(
                "no-chat-template",
                "the data are conversations, but the tokenizer has no chat template",
                why="a base model does not say how turns are written",
                fix="set data.chat_template to a Jinja file, or start from the model's instruct version",
            )
        )


def render(
    tokenizer: Any, turns: Sequence[Turn], tools: Sequence[Any] = (), *, add_generation_prompt: bool = False
) -> str:
    """Return the text of the turns; RowError where the template refuses them."""
    messages = [turn.as_message() for turn in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        roles = ", ".join(turn.role for turn in turns)
        fix = f"the roles are: {roles}; mend the row, or set data.chat_template"
        raise RowError(f"the chat template refuses the conversation: {error}", fix) from error
    return str(text)


def render_conversation(tokenizer: Any, conversation: Conversation, *, answers_only: bool) -> Rendered:
    """Return a row's text and its trained spans."""
    if not conversation.turns:
        text = conversation.prompt + conversation.completion
        if not conversation.completion.strip():
            return Rendered(text, (), templated=False)
        # One beyond the end: tokenizers report an all-blank last token as an empty span there.
        start = len(conversation.prompt) if answers_only else 0
        return Rendered(text, ((start, len(text) + 1),), templated=False)
    require_template(tokenizer)
    text = render(tokenizer, conversation.turns, conversation.tools)
    if not answers_only:
        return Rendered(text, ((0, len(text) + 1),), templated=True)
    spans = tuple(
        _answer_span(tokenizer, conversation, index, text)
        for index, turn in enumerate(conversation.turns)
        if _learned(turn)
    )
    return Rendered(text, spans, templated=True)


def _learned(turn: Turn) -> bool:
    """Return whether there is something to learn; an empty answer would teach silence."""
    return turn.role == "assistant" and turn.trained and bool(turn.content.strip() or turn.extra)


def _answer_span(tokenizer: Any, conversation: Conversation, index: int, text: str) -> Span:
    """Return where turn `index` stands in the whole text, with the mark that ends it."""
    turns, tools = conversation.turns, conversation.tools
    before = _try_render(tokenizer, turns[:index], tools, add_generation_prompt=True) if index else None
    after = text if index + 1 == len(turns) else _try_render(tokenizer, turns[: index + 1], tools)
    opened = before is not None and text.startswith(before)
    if opened and after is not None and text.startswith(after) and after.startswith(before):  # type: ignore[arg-type]
        return _without_trailing_blanks(text, (len(before), len(after)), turns[index])  # type: ignore[arg-type]
    start, answer_end, end = _span_by_sentinel(tokenizer, conversation, index, text)
    if opened and len(before) <= start:  # type: ignore[arg-type]
        start = len(before)  # type: ignore[arg-type]
    return _without_trailing_blanks(text, (start, end), turns[index], least=answer_end)


def _try_render(
    tokenizer: Any, turns: Sequence[Turn], tools: Sequence[Any], *, add_generation_prompt: bool = False
) -> str | None:
    try:
        return render(tokenizer, turns, tools, add_generation_prompt=add_generation_prompt)
    except RowError:
        # The beginning of a conversation may be refused although the whole is not.
        return None


def _span_by_sentinel(tokenizer: Any, conversation: Conversation, index: int, text: str) -> tuple[int, int, int]:
    """Return start and end of the answer, and the end of the mark after it."""
    turns = list(conversation.turns)
    sentinel = next(mark for number in itertools.count() if (mark := f"@@ANSWER-{number}@@") not in text)
    turns[index] = replace(turns[index], content=sentinel)
    head, found, tail = render(tokenizer, turns, conversation.tools).partition(sentinel)
    if not found or sentinel in tail or not text.startswith(head) or not text.endswith(tail):
        raise RowError(
            f"cannot find turn {index + 1}, an answer, in what the chat template makes of it",
            "the template rewrites answers: set data.chat_template to one that writes them as they are",
        )
    end = len(text) - len(tail)
    if end < len(head):
        raise RowError(
            f"the chat template leaves out turn {index + 1}, an answer", "set data.chat_template to one that keeps it"
        )
    alone = _try_render(tokenizer, turns[: index + 1], conversation.tools)
    closing = alone.partition(sentinel)[2] if alone is not None else tail
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(closing, tail, strict=False))
    return len(head), end, end + sum(1 for _ in same)


def _without_trailing_blanks(text: str, span: Span, turn: Turn, *, least: int = 0) -> Span:
    """Leave out blanks after the end-of-turn mark: a model stops at the mark and never gets to write them.

    Where the template has no mark, the blanks are what ends the turn, and stay.
    """
    start, end = span
    written, content = text[start:end], turn.content.strip()
    at = written.find(content)
    if at >= 0 and not written[at + len(content) :].strip():
        return span
    return start, max(least, start + len(written.rstrip()))
