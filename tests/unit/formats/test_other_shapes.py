"""Verdicts, prompts alone, and reasons: rows of which more is carried than what to say."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ftune import plugin
from ftune.plugin import Conversation, RowError, Turn

ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PROMPT = Turn("user", "q", trained=False)


def views(name: str, row: dict[str, Any]) -> tuple[Conversation, ...]:
    found = plugin.format_named(name)
    made = found.read_views(row)
    assert made[0] == found.read(row)
    assert len(made) == len(found.views)
    return made


@pytest.mark.parametrize("label", [True, False])
def test_the_verdict_goes_with_the_answer(label: bool) -> None:
    (plain,) = views("unpaired_preference", {"prompt": "p", "completion": "c", "label": label})
    assert plain == Conversation(prompt="p", completion="c", columns={"label": label})
    (chat,) = views("unpaired_preference", {"prompt": [ASKED], "completion": [ANSWERED], "label": label})
    assert chat == Conversation(turns=(PROMPT, Turn("assistant", "a")), columns={"label": label})


def test_a_prompt_keeps_the_other_columns_and_teaches_nothing() -> None:
    row = {"answer": 3, "solution": None, "id": "x"}
    (plain,) = views("prompt", {"prompt": "1 + 2 =", **row})
    assert plain == Conversation(prompt="1 + 2 =", columns=row)
    (chat,) = views("prompt", {"prompt": [ASKED, ANSWERED, ASKED], "system": "s", "tools": [{"a": 1}], **row})
    assert [turn.role for turn in chat.turns] == ["system", "user", "assistant", "user"]
    assert not any(turn.trained for turn in chat.turns)
    assert (chat.tools, chat.columns, chat.completion) == (({"a": 1},), row, "")
    assert not plugin.format_named("prompt").teaches


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "rationale": "r", "answer": "a"},
        {"input": "q", "rationale": "r", "label": "a"},
        {"question": None, "input": "q", "rationale": "r", "answer": "a", "label": 3},
    ],
)
def test_a_rationale_is_two_tasks(row: dict[str, Any]) -> None:
    answer, rationale = views("rationale", row)
    assert answer.turns == (Turn("user", "predict: q"), Turn("assistant", "a"))
    assert rationale.turns == (Turn("user", "explain: q"), Turn("assistant", "r"))
    assert list(plugin.format_named("rationale").remarks((answer, rationale))) == []


@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_without_reasons_the_answer_is_still_taught(nothing: str | None) -> None:
    found = plugin.format_named("rationale")
    made = views("rationale", {"question": "q", "rationale": nothing, "answer": "a", "system": "s"})
    assert [turn.role for turn in made[0].turns] == ["system", "user", "assistant"]
    assert [turn.role for turn in made[1].turns] == ["system", "user"]
    assert list(found.remarks(made)) == ["missing-rationale"] == [finding.kind for finding in found.findings]


@pytest.mark.parametrize(
    ("name", "row", "what", "fix"),
    [
        ("unpaired_preference", {"prompt": "p", "completion": "c", "lable": True}, "no `label`", "mean `lable`"),
        ("unpaired_preference", {"prompt": "p", "completion": "c", "label": 1}, "`label` is a number", "write true"),
        ("unpaired_preference", {"prompt": "p", "completion": [ANSWERED], "label": True}, "`prompt` is text but", ""),
        ("prompt", {"promt": "p"}, "no `prompt`", "did you mean `promt`"),
        ("prompt", {"prompt": " "}, "`prompt` is empty", "remove"),
        ("prompt", {"prompt": None}, "`prompt` is null, not a list", ""),
        ("prompt", {"prompt": [ASKED, ANSWERED]}, r"`prompt\[1\]` is the assistant's", "end `prompt`"),
        ("prompt", {"prompt": "p", "system": "s"}, "`system` belongs to conversations", "lists of messages"),
        ("rationale", {"question": "q", "rational": "r", "answer": "a"}, "no `rationale`", "did you mean `rational`"),
        ("rationale", {"qestion": "q", "rationale": "r", "answer": "a"}, "no `question`", "did you mean `qestion`"),
        ("rationale", {"question": "q", "rationale": ["r"], "answer": "a"}, "`rationale` is a list", "quotes"),
        ("rationale", {"input": "q", "rationale": "r", "label": 2}, "`label` is a number", "quotes"),
        ("rationale", {"input": " ", "rationale": "r", "label": "a"}, "`input` is empty", "remove"),
    ],
)
def test_what_is_wrong_with_a_row(name: str, row: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(RowError) as caught:
        plugin.format_named(name).read_views(row)
    assert re.search(what, caught.value.what)
    assert re.search(fix, caught.value.fix)
