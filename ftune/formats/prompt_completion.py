"""A prompt and how it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.formats import kind_of, missing, turns_of
from ftune.plugin import Conversation, Format, RowError


class PromptCompletion(Format):
    """Two texts are joined as they are, without a chat template; two lists of messages are one conversation."""

    name: ClassVar[str] = "prompt_completion"
    summary: ClassVar[str] = "A prompt and its completion, as plain texts or as lists of messages."
    columns: ClassVar[str] = '{"prompt": ..., "completion": ...}'
    loss_setting: ClassVar[str] = "completion_only_loss"
    """The data setting that says whether what comes before the answer counts in the loss too."""
    templated: ClassVar[bool | None] = None

    def detect(self, row: Mapping[str, Any]) -> bool:
        return "prompt" in row and "completion" in row

    def read(self, row: Mapping[str, Any]) -> Conversation:
        for key in ("prompt", "completion"):
            if key not in row:
                raise missing(key, row)
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Conversation(prompt=prompt, completion=completion)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise RowError(
                f"`prompt` is {kind_of(prompt)} but `completion` is {kind_of(completion)}",
                "write both as text or both as lists of messages",
            )
        asked = tuple(dataclasses.replace(turn, trained=False) for turn in turns_of(prompt, "prompt"))
        return Conversation(turns=asked + turns_of(completion, "completion"))


plugin = PromptCompletion()
