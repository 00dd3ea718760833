"""Two answers to one prompt: where the prompt ends, and what is odd about the answers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ftune import plugin
from ftune.plugin import Conversation, RowError, Turn

PREFERENCE = plugin.format_named("preference")
SYSTEM, ASKED = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
PROMPT = (Turn("user", "q", trained=False),)


def read(**row: Any) -> tuple[Conversation, ...]:
    views = PREFERENCE.read_views(row)
    assert PREFERENCE.read(row) == views[0]
    assert len(views) == len(PREFERENCE.views) == 2
    return views


def texts(**row: Any) -> tuple[str, str, str]:
    chosen, rejected = read(**row)
    assert chosen.prompt == rejected.prompt
    assert not chosen.turns
    return chosen.prompt, chosen.completion, rejected.completion


def remarks(**row: Any) -> list[str]:
    return list(PREFERENCE.remarks(read(**row)))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": "good", "rejected": "bad"},
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": None, "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "question": "elsewhere too"},
        {"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "weight": 0}, BAD], "score": 1, "margin": 0.5, "prompt_id": 4},
    ],
)
def test_the_same_pair_in_every_shape(row: dict[str, Any]) -> None:
    chosen, rejected = read(**row)
    assert chosen == Conversation(turns=(*PROMPT, Turn("assistant", "good")))
    assert rejected == Conversation(turns=(*PROMPT, Turn("assistant", "bad")))


def test_texts_stay_as_they_are_beside_their_prompt() -> None:
    assert texts(prompt="The sky is", chosen=" blue.", rejected=" grey.") == ("The sky is", " blue.", " grey.")
    assert texts(prompt="The s", chosen="ky", rejected="un", system="", tools=[]) == ("The s", "ky", "un")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is grey.", "The sky is"),
        ("\n\nHuman: q\n\nAssistant: Yes.", "\n\nHuman: q\n\nAssistant: No.", "\n\nHuman: q\n\nAssistant:"),
        ("Q: q\nA:yes", "Q: q\nA:no", "Q: q\nA:"),
        ("q\nyes", "q\nno", "q\n"),
        ("It is thought", "It is this", "It is"),  # not "It is th"
        ("A: I think", "A: I'm", "A: I"),
        ("cafe\u0301 bar", "cafe bar", ""),  # the letter and its accent stay together
        ("\u7b54\uff1a\u84dd\u8272", "\u7b54\uff1a\u84dd\u7eff", "\u7b54\uff1a\u84dd"),  # no blanks, so no cutting back
        ("yes", "no", ""),
        ("no ", "ok ", ""),
        ("The sky is blue", "The sky is blue and vast", "The sky is"),
        ("The sky is blue", "The sky is blue", "The sky is"),
        ("The sky is blue ", "The sky is blue", "The sky is"),
        ("q\nyes\n", "q\nyes\nand no", "q\n"),
        ("", "no", ""),
    ],
)
def test_texts_share_a_beginning_of_whole_words(chosen: str, rejected: str, prompt: str) -> None:
    assert texts(chosen=chosen, rejected=rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    assert texts(chosen=rejected, rejected=chosen)[0] == prompt


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ([SYSTEM, ASKED, GOOD, ASKED, GOOD], [SYSTEM, ASKED, GOOD, ASKED, BAD], 4),
        ([ASKED, GOOD, ASKED, GOOD], [ASKED, BAD, ASKED, GOOD], 1),
        ([ASKED, GOOD], [ASKED, GOOD], 1),
        ([ASKED, GOOD], [ASKED, GOOD, ASKED, BAD], 1),
        ([ASKED, GOOD, ASKED, BAD], [ASKED, GOOD, ASKED, BAD, ASKED, GOOD], 3),
        ([GOOD], [BAD], 0),
    ],
)
def test_conversations_share_turns_up_to_an_answer(chosen: list[Any], rejected: list[Any], shared: int) -> None:
    views = read(chosen=chosen, rejected=rejected)
    for view, messages in zip(views, (chosen, rejected), strict=True):
        assert [turn.as_message() for turn in view.turns] == messages
        assert [turn.trained for turn in view.turns] == [at >= shared for at in range(len(messages))]


def test_system_and_tools_come_with_both() -> None:
    for view in read(prompt=[ASKED], chosen=[GOOD], rejected=[BAD], system="s", tools='[{"type": "function"}]'):
        assert view.turns[:2] == (Turn("system", "s", trained=False), *PROMPT)
        assert view.tools == ({"type": "function"},)
    own = read(chosen=[SYSTEM, ASKED, GOOD], rejected=[SYSTEM, ASKED, BAD], system="another")
    assert [turn.role for turn in own[0].turns] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": " a\n"}, ["chosen-is-rejected"]),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [{**GOOD, "content": "good "}]}, ["chosen-is-rejected"]),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, ["chosen-is-rejected"]),
        ({"chosen": "yes", "rejected": "no"}, ["no-prompt"]),
        ({"prompt": " ", "chosen": [GOOD], "rejected": [BAD]}, ["no-prompt"]),
        ({"chosen": [GOOD], "rejected": [BAD], "system": "s"}, ["no-prompt"]),
        ({"prompt": "p", "chosen": "a" * 31, "rejected": "b" * 10}, ["length-margin"]),
        ({"prompt": "p", "chosen": "b" * 10, "rejected": "a" * 31}, ["length-margin"]),
        ({"prompt": "p", "chosen": "a" * 30, "rejected": "b" * 10}, []),
        ({"prompt": "p" * 99, "chosen": "a" * 30, "rejected": ""}, []),
        ({"prompt": [{**ASKED, "content": "q" * 99}], "chosen": [GOOD], "rejected": "a" * 13}, ["length-margin"]),
        ({"prompt": [ASKED], "chosen": [{**GOOD, "name": "x"}], "rejected": [{**GOOD, "name": "y"}]}, []),
    ],
)
def test_what_is_odd_about_a_pair(row: dict[str, Any], kinds: list[str]) -> None:
    if isinstance(row["chosen"], list) != isinstance(row["rejected"], list):
        row = {**row, "rejected": [{"role": "assistant", "content": row["rejected"]}]}
    assert remarks(**row) == kinds
    known = {finding.kind: finding.severity for finding in PREFERENCE.findings}
    assert known == {"chosen-is-rejected": "warning", "no-prompt": "warning", "length-margin": "note"}


@pytest.mark.parametrize(
    ("row", "what", "fix"),
    [
        ({"chosen": "c", "rejectd": "r"}, "no `rejected`", "did you mean `rejectd`"),
        ({"chosen": "c", "rejected": [BAD]}, "`chosen` is text but `rejected` is a list", "both"),
        ({"prompt": "p", "chosen": "c", "rejected": None}, "`chosen` is text but `rejected` is null", "both"),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, "`prompt` is a number, not a list", ""),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "`prompt` is an empty list", ""),
        ({"question": "q", "chosen": "c", "rejected": "r"}, "no `prompt`, but `question`", "rename `question`"),
        ({"input": "q", "chosen": [GOOD], "rejected": [BAD]}, "no `prompt`, but `input`", "rename `input`"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "system": "s"}, "`system` belongs to conv", "lists of mess"),
        ({"chosen": "c", "rejected": "r", "tools": [{"a": 1}]}, "`tools` belongs to conversations", "lists of mess"),
        ({"prompt": [ASKED, GOOD], "chosen": [GOOD], "rejected": [BAD]}, r"`prompt\[1\]` is the assistant's", "end"),
        ({"prompt": [SYSTEM], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "`chosen` goes on .* `user`", "out"),
        ({"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED]}, "`rejected` holds the prompt but", "add"),
        (
            {"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "other"}, BAD]},
            r"`chosen\[0\]` and `rejected\[0\]` differ",
            "same up to the answer",
        ),
        ({"chosen": [ASKED, GOOD, ASKED], "rejected": [ASKED, GOOD, BAD]}, r"`chosen\[2\]` and", "same up to"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED]}, "`rejected` ends before an answer", "end it"),
        ({"chosen": [ASKED], "rejected": [ASKED, GOOD]}, "`chosen` ends before an answer", "end it"),
        ({"chosen": [ASKED, GOOD, ASKED], "rejected": [ASKED, GOOD, ASKED, BAD]}, "`chosen` ends before", "end it"),
        ({"chosen": [ASKED, {"role": "gpt", "content": "x"}], "rejected": []}, r"chosen\[1\].role` is `gpt`", ""),
    ],
)
def test_what_is_wrong_with_a_pair(row: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(RowError) as caught:
        PREFERENCE.read_views(row)
    assert re.search(what, caught.value.what)
    assert re.search(fix, caught.value.fix)


def test_a_prompt_elsewhere_that_the_texts_repeat_is_no_fault() -> None:
    assert texts(question="Why?", chosen="Why? So.", rejected="Why? No.") == ("Why?", " So.", " No.")
