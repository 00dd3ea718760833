"""A prompt, one answer to it, and whether that answer is good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from ftune.formats import kind_of, missing, prompt_and_completion
from ftune.plugin import Conversation, Format, RowError


class UnpairedPreference(Format):
    """A `prompt_completion` row with a verdict, which the conversation carries in its `columns`."""

    name: ClassVar[str] = "unpaired_preference"
    summary: ClassVar[str] = "A prompt, a completion, and a label that says whether the completion is good."
    columns: ClassVar[str] = '{"prompt": ..., "completion": ..., "label": true}'
    loss_setting: ClassVar[str] = "completion_only_loss"
    templated: ClassVar[bool | None] = None

    def detect(self, row: Mapping[str, Any]) -> bool:
        return "prompt" in row and "completion" in row and isinstance(row.get("label"), bool)

    def read(self, row: Mapping[str, Any]) -> Conversation:
        conversation = prompt_and_completion(row)
        if "label" not in row:
            raise missing("label", row)
        label = row["label"]
        if not isinstance(label, bool):
            fix = "write true for a good completion, false for a bad one"
            raise RowError(f"`label` is {kind_of(label)}, not true or false", fix)
        return replace(conversation, columns={"label": label})


plugin = UnpairedPreference()
