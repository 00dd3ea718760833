"""Plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.formats import text_of
from ftune.plugin import Conversation, Format

_SAID_ELSEWHERE = frozenset(
    {"messages", "conversations", "instruction", "prompt", "completion", "chosen", "question", "rationale"}
)
"""Columns beside which `text` is a rendered copy or a remark, so that the format must be named."""


class Text(Format):
    """Every token counts in the loss; a bare line of text is a row too."""

    name: ClassVar[str] = "text"
    summary: ClassVar[str] = "Plain text; every token is learned."
    columns: ClassVar[str] = '{"text": ...}, or a bare text per line'
    trains_whole_text: ClassVar[bool] = True
    templated: ClassVar[bool | None] = False

    def detect(self, row: Mapping[str, Any]) -> bool:
        return isinstance(row.get("text"), str) and _SAID_ELSEWHERE.isdisjoint(row)

    def read(self, row: Mapping[str, Any]) -> Conversation:
        return Conversation(completion=text_of(row, "text"))


plugin = Text()
