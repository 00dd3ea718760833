"""Conversations as ShareGPT exports write them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.formats import missing, text_of, turns_of
from ftune.plugin import Conversation, Format, RowError, Turn

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Who spoke, in the exports' words: the role a chat template knows."""


class ShareGpt(Format):
    """Like `messages`, in other words; also takes `role` and `content` inside `conversations`."""

    name: ClassVar[str] = "sharegpt"
    summary: ClassVar[str] = "Conversations: a list of turns, each with `from` (human, gpt, system, tool) and `value`."
    columns: ClassVar[str] = '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}'

    def detect(self, row: Mapping[str, Any]) -> bool:
        return isinstance(row.get("conversations"), (list, tuple))

    def read(self, row: Mapping[str, Any]) -> Conversation:
        if "conversations" not in row:
            raise missing("conversations", row)
        listed = row["conversations"]
        first = listed[0] if isinstance(listed, (list, tuple)) and listed else None
        if isinstance(first, Mapping) and "from" not in first and "role" in first:
            turns = turns_of(listed, "conversations")
        else:
            turns = turns_of(listed, "conversations", role_key="from", text_key="value")
        turns = tuple(_renamed(turn, index) for index, turn in enumerate(turns))
        system = "" if row.get("system") is None else text_of(row, "system")
        if system and turns[0].role != "system":
            turns = (Turn("system", system), *turns)
        return Conversation(turns=turns)


def _renamed(turn: Turn, index: int) -> Turn:
    if turn.role not in ROLES:
        near = difflib.get_close_matches(turn.role, ROLES, n=1)
        fix = f"did you mean `{near[0]}`?" if near else "known are " + ", ".join(ROLES)
        raise RowError(f"`conversations[{index}].from` is `{turn.role}`", fix)
    return dataclasses.replace(turn, role=ROLES[turn.role])


plugin = ShareGpt()
