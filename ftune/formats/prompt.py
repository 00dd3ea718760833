"""A prompt alone: the answer is the model's own affair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.formats import asked_turns, missing, refuse_chat_columns, tools_of, with_system
from ftune.plugin import Conversation, Format, RowError

_ANSWERED = frozenset(
    {"completion", "completions", "chosen", "rejected", "response", "output", "messages", "conversations", "text"}
)
"""Columns that hold an answer to learn, or everything: with them beside `prompt`, the format must be named."""
_SAID = frozenset({"prompt", "system", "tools"})


class Prompt(Format):
    """What to generate an answer to; nothing of it is learned.

    Text is continued as it stands, messages are written by the chat template. Every other column (`answer`, `solution`)
    is kept as it is in the conversation's `columns`, for a reward function to compare with.
    """

    name: ClassVar[str] = "prompt"
    summary: ClassVar[str] = "A prompt alone, to generate answers to; other columns are kept for reward functions."
    columns: ClassVar[str] = '{"prompt": ...}'
    teaches: ClassVar[bool] = False
    loss_setting: ClassVar[str] = "completion_only_loss"
    templated: ClassVar[bool | None] = None

    def detect(self, row: Mapping[str, Any]) -> bool:
        return isinstance(row.get("prompt"), (str, list, tuple)) and _ANSWERED.isdisjoint(row)

    def read(self, row: Mapping[str, Any]) -> Conversation:
        if "prompt" not in row:
            raise missing("prompt", row)
        prompt = row["prompt"]
        kept = {key: value for key, value in row.items() if key not in _SAID}
        if not isinstance(prompt, str):
            turns = with_system(asked_turns(prompt), row)
            return Conversation(turns=turns, tools=tools_of(row), columns=kept)
        refuse_chat_columns(row)
        if not prompt.strip():
            raise RowError("`prompt` is empty", "remove the row")
        return Conversation(prompt=prompt, columns=kept)


plugin = Prompt()
