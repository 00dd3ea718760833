"""Conversations as OpenAI and Hugging Face write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.formats import missing, tools_of, turns_of
from ftune.plugin import Conversation, Format


class Messages(Format):
    """A list of messages; every assistant message is learned unless it says `weight: 0` or `train: false`."""

    name: ClassVar[str] = "messages"
    summary: ClassVar[str] = "Conversations: a list of messages, each with a role and content."
    columns: ClassVar[str] = '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'

    def detect(self, row: Mapping[str, Any]) -> bool:
        return isinstance(row.get("messages"), (list, tuple))

    def read(self, row: Mapping[str, Any]) -> Conversation:
        if "messages" not in row:
            raise missing("messages", row)
        return Conversation(turns=turns_of(row["messages"], "messages"), tools=tools_of(row))


plugin = Messages()
