"""Instructions as Stanford Alpaca wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ftune.formats import kind_of, optional_text, text_of
from ftune.plugin import Conversation, Format, RowError, Turn


class Alpaca(Format):
    """Instruction, optional input, output: rendered with the model's chat template, not with Alpaca's own prompt."""

    name: ClassVar[str] = "alpaca"
    summary: ClassVar[str] = "Instructions: instruction, optional input, output; also system and history."
    columns: ClassVar[str] = '{"instruction": ..., "input": ..., "output": ...}'

    def detect(self, row: Mapping[str, Any]) -> bool:
        return "instruction" in row and "output" in row

    def read(self, row: Mapping[str, Any]) -> Conversation:
        instruction, output = text_of(row, "instruction"), text_of(row, "output")
        system, context = optional_text(row, "system"), optional_text(row, "input")
        turns = [Turn("system", system)] if system else []
        for question, answer in _history(row.get("history")):
            turns += [Turn("user", question), Turn("assistant", answer)]
        asked = "\n\n".join(part for part in (instruction, context) if part.strip())
        if not asked:
            raise RowError("`instruction` and `input` are both empty", "remove the row")
        return Conversation(turns=(*turns, Turn("user", asked), Turn("assistant", output)))


def _history(value: Any) -> list[tuple[str, str]]:
    pairs = []
    if value is not None and not isinstance(value, (list, tuple)):
        raise RowError(f"`history` is {kind_of(value)}, not a list of [question, answer] pairs")
    for index, pair in enumerate(value or ()):
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not isinstance(pair[0], str)
            or not isinstance(pair[1], str)
        ):
            raise RowError(f"`history[{index}]` is not a [question, answer] pair of texts")
        pairs.append((pair[0], pair[1]))
    return pairs


plugin = Alpaca()
