"""Conversations as OpenAI and Hugging Face write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.formats import kind_of, missing, turns_of
from ftune.plugin import Conversation, Format, RowError


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
        return Conversation(turns=turns_of(row["messages"], "messages"), tools=_tools(row.get("tools")))


def _tools(value: Any) -> tuple[Any, ...]:
    """Return the row's tools; Parquet files often hold them as JSON text, since their shapes differ."""
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


plugin = Messages()
