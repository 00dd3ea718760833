"""A prompt and how it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.formats import prompt_and_completion
from ftune.plugin import Conversation, Format


class PromptCompletion(Format):
    """Two texts are joined as they are, without a chat template; two lists of messages are one conversation."""

    name: ClassVar[str] = "prompt_completion"
    summary: ClassVar[str] = "A prompt and its completion, as plain texts or as lists of messages."
    columns: ClassVar[str] = '{"prompt": ..., "completion": ...}'
    loss_setting: ClassVar[str] = "completion_only_loss"
    """The data setting that says whether what comes before the answer counts in the loss too."""
    templated: ClassVar[bool | None] = None

    def detect(self, row: Mapping[str, Any]) -> bool:
        # With a verdict beside it, the completion may be one that nobody should learn.
        return "prompt" in row and "completion" in row and not isinstance(row.get("label"), bool)

    def read(self, row: Mapping[str, Any]) -> Conversation:
        return prompt_and_completion(row)


plugin = PromptCompletion()
