"""A question, its answer, and the reasons a teacher gave (Hsieh et al., 2023, distilling step by step)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from ftune.formats import missing, optional_text, text_of, with_system
from ftune.plugin import Conversation, Finding, Format, RowError, Turn

_PREFIXES = ("predict: ", "explain: ")
"""What the authors' code puts before a question to ask for its answer, and for its reasons."""
_QUESTION, _ANSWER = ("question", "input"), ("answer", "label")
"""Our names, and those of the authors' files; the first where a row has both."""


class Rationale(Format):
    """Two tasks from one row: `predict: QUESTION` is answered, `explain: QUESTION` is reasoned about.

    The question is the user's turn and the prefix stands in front of it, whatever the chat template (a base model needs
    `data.chat_template`): some templates refuse a system message, and none loses the user's words. As in the paper,
    the trained model is asked with `predict: ` and then gives its answer without reasons.
    """

    name: ClassVar[str] = "rationale"
    summary: ClassVar[str] = "A question, its answer and the reasons for it: two tasks, told apart by a prefix."
    columns: ClassVar[str] = '{"question": ..., "rationale": ..., "answer": ...}'
    views: ClassVar[tuple[str, ...]] = ("answer", "rationale")
    findings: ClassVar[tuple[Finding, ...]] = (
        Finding(
            "missing-rationale",
            "have no rationale",
            "they teach the answer but not the reasons for it, as plain fine-tuning does",
            "let a teacher write the reasons, or remove them",
        ),
    )

    def detect(self, row: Mapping[str, Any]) -> bool:
        named = [any(key in row for key in keys) for keys in (_QUESTION, _ANSWER)]
        return "rationale" in row and all(named)

    def read(self, row: Mapping[str, Any]) -> Conversation:
        return self.read_views(row)[0]

    def read_views(self, row: Mapping[str, Any]) -> tuple[Conversation, ...]:
        asked, said = _present(row, _QUESTION), _present(row, _ANSWER)
        question, answer = text_of(row, asked), text_of(row, said)
        if "rationale" not in row:
            raise missing("rationale", row)
        if not question.strip():
            raise RowError(f"`{asked}` is empty", "remove the row")
        answered, explained = (Turn("user", prefix + question) for prefix in _PREFIXES)
        reasons = optional_text(row, "rationale")
        # Without reasons there is no answer to `explain: `, not an empty one.
        second = (explained, Turn("assistant", reasons)) if reasons.strip() else (explained,)
        views = ((answered, Turn("assistant", answer)), second)
        return tuple(Conversation(turns=with_system(turns, row)) for turns in views)

    def remarks(self, views: tuple[Conversation, ...]) -> Iterable[str]:
        if views[1].turns[-1].role != "assistant":
            yield "missing-rationale"


def _present(row: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """Return the first of the columns that is there; columnar files write null where nothing is."""
    return next((key for key in keys if row.get(key) is not None), keys[0])


plugin = Rationale()
