"""A conversation as the chat template writes it, and where in that text the trained answers stand.

`render` is the only place where ftune calls a chat template: training, evaluation, chat and merging all come here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2

from ftune.data.answers import Page, is_learned, left_out
from ftune.errors import DataError, Place, Problem
from ftune.plugin import Conversation, RowError, Turn

Span = tuple[int, int]

_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class Rendered:
    """A row's whole text and the character spans that count in the loss."""

    text: str
    spans: tuple[Span, ...]
    templated: bool
    """Rendered by a chat template, which writes its own begin and end marks."""
    rewritten: bool = False
    """The template writes a learned answer otherwise than the row has it: it drops earlier thinking, say."""
    unprompted: bool = False
    """The last answer follows another text than generation would be given: training and use differ."""


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
    tokenizer: Any,
    turns: Sequence[Turn],
    tools: Sequence[Any] = (),
    *,
    add_generation_prompt: bool = False,
    today: str | None = None,
) -> str:
    """Return the text of the turns, `today` standing for any date in it; RowError where the template refuses them."""
    try:
        return _write(tokenizer, turns, tools, add_generation_prompt, today)
    except _REFUSALS as error:
        raise _refused(tokenizer, turns, tools, error) from error


def _write(tokenizer: Any, turns: Sequence[Turn], tools: Sequence[Any], heading: bool, today: str | None = None) -> str:
    messages = [turn.as_message() for turn in turns]
    settings: dict[str, Any] = {"tools": list(tools) or None, "tokenize": False, "add_generation_prompt": heading}
    if today is not None:
        # A macro, since transformers lets no function be handed to a template.
        fixed = f"{{% macro strftime_now(format) %}}{today}{{% endmacro %}}"
        settings["chat_template"] = fixed + tokenizer.get_chat_template(tools=settings["tools"])
    return str(tokenizer.apply_chat_template(messages, **settings))


def _writer(tokenizer: Any, tools: Sequence[Any]) -> Callable[[Sequence[Turn], bool], str | None]:
    def write(turns: Sequence[Turn], heading: bool) -> str | None:
        try:
            return _write(tokenizer, turns, tools, heading)
        except _REFUSALS:
            # The beginning of a conversation may be refused although the whole is not.
            return None

    return write


def _refused(tokenizer: Any, turns: Sequence[Turn], tools: Sequence[Any], error: Exception) -> RowError:
    """Return the error with the role that is to blame, where leaving that role out is enough."""
    write = _writer(tokenizer, tools)
    for role in dict.fromkeys(turn.role for turn in turns if turn.role not in ("user", "assistant")):
        others = [turn for turn in turns if turn.role != role]
        if others and write(others, False) is not None:
            fix = f"set data.chat_template to one that writes the role `{role}`"
            if role in ("system", "developer"):
                fix = f"put the `{role}` text at the head of the first user turn, or {fix}"
            return RowError(f"the chat template refuses the role `{role}`: {error}", fix)
    for number, (one, other) in enumerate(itertools.pairwise(turns), 1):
        if one.role == other.role:
            fix = f"turns {number} and {number + 1} are both of the role `{one.role}`: join them, or set"
            return RowError(f"the chat template refuses the conversation: {error}", f"{fix} data.chat_template")
    roles = ", ".join(f"`{turn.role}`" for turn in turns)
    fix = f"the roles are {roles}; mend the row, or set data.chat_template"
    return RowError(f"the chat template refuses the conversation: {error}", fix)


def render_conversation(
    tokenizer: Any,
    conversation: Conversation,
    *,
    answers_only: bool,
    train_on_turns: Literal["all", "last"] = "all",
) -> Rendered:
    """Return a row's text and its trained spans: of all answers, or of the last one that is learned."""
    if not conversation.turns:
        return _plain(conversation, answers_only=answers_only)
    require_template(tokenizer)
    turns, tools = conversation.turns, conversation.tools
    text = render(tokenizer, turns, tools)
    page = Page(text, turns, _writer(tokenizer, tools), lambda: _marks(tokenizer))
    _require_all(page)
    if not answers_only:
        return Rendered(text, ((0, len(text) + 1),), templated=True)
    learned = [index for index, turn in enumerate(turns) if is_learned(turn)]
    if train_on_turns == "last":
        learned = learned[-1:]
    places = [(index, page.answer(index)) for index in learned]
    found = [(index, place) for index, place in places if place is not None]
    return Rendered(
        text,
        tuple((place.start, place.end) for _, place in found),
        templated=True,
        rewritten=len(found) < len(places) or any(place.rewritten for _, place in found),
        unprompted=any(index + 1 == len(turns) and index > 0 and not place.opened for index, place in found),
    )


def _plain(conversation: Conversation, *, answers_only: bool) -> Rendered:
    text = conversation.prompt + conversation.completion
    if not conversation.completion.strip():
        return Rendered(text, (), templated=False)
    # One beyond the end: tokenizers report an all-blank last token as an empty span there.
    start = len(conversation.prompt) if answers_only else 0
    return Rendered(text, ((start, len(text) + 1),), templated=False)


def _marks(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of the special tokens, without the runs of blanks that some tokenizers add."""
    return tuple({text for token in tokenizer.added_tokens_decoder.values() if (text := token.content).strip()})


def _require_all(page: Page) -> None:
    """Refuse a conversation of which the template drops a turn: what is asked would be learned without it."""
    for index, turn in enumerate(page.turns):
        content = turn.content.strip()
        if not content or is_learned(turn) or turn.extra.get("tool_calls"):
            continue
        # One turn may quote another, so that finding a text is not enough.
        if page.text.count(content) >= sum(other.content.count(content) for other in page.turns):
            continue
        # It may be there in other letters, as JSON; then another content makes another text.
        other = replace(turn, content=page.sentinel)
        if page.write((*page.turns[:index], other, *page.turns[index + 1 :]), False) == page.text:
            raise left_out(index, turn)
