"""Rows as people write them, and what is said of those that are wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from ftune import plugin
from ftune.plugin import RowError, Turn

ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
DIALOGUE = (Turn("user", "q"), Turn("assistant", "a"))

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": [ASKED, ANSWERED]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    ("sharegpt", {"conversations": [ASKED, ANSWERED]}),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}),
    ("alpaca", {"instruction": "q", "output": "a", "text": "### Instruction: q"}),
]
OTHERS = [
    ("prompt_completion", {"prompt": "p", "completion": "c"}),
    ("text", {"text": "t"}),
    ("text", {"text": "t", "id": 3}),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}),
    ("preference", {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [ANSWERED], "score_chosen": 7.5}),
    ("preference", {"chosen": "p c", "rejected": "p r", "margin": 0.5}),
    ("preference", {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED], "text": "rendered"}),
    ("unpaired_preference", {"prompt": "p", "completion": "c", "label": False}),
    ("prompt_completion", {"prompt": "p", "completion": "c", "label": "physics"}),
    ("prompt", {"prompt": "p"}),
    ("prompt", {"prompt": [ASKED], "answer": "3", "solution": "1 + 2"}),
    ("rationale", {"question": "q", "rationale": "r", "answer": "a"}),
    ("rationale", {"input": "q", "rationale": None, "label": "a", "llm_label": "b", "text": "rendered"}),
    ("rationale", {"question": "q", "rationale": "r", "answer": "a", "label": 2}),
]


def read(name: str, row: dict[str, Any]) -> plugin.Conversation:
    return plugin.format_named(name).read(row)


def trained(turns: tuple[Turn, ...]) -> list[bool]:
    return [turn.trained for turn in turns if turn.role == "assistant"]


@pytest.mark.parametrize(("name", "row"), GOOD)
def test_the_same_dialogue_in_every_format(name: str, row: dict[str, Any]) -> None:
    assert read(name, row).turns == DIALOGUE


@pytest.mark.parametrize(("name", "row"), GOOD + OTHERS)
def test_exactly_one_format_claims_a_row(name: str, row: dict[str, Any]) -> None:
    claims = [other for other in plugin.names(plugin.FORMATS) if plugin.format_named(other).detect(row)]
    assert claims == [name]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "label": "yes"},
        {"question": "q", "answer": "a"},
        {"prompt": "p", "response": "r"},
        {"prompt": "p", "text": "p and more"},
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
        {"prompt": 3},
        {"prompt": "p", "chosen": "c"},
        {},
    ],
)
@pytest.mark.parametrize("name", plugin.names(plugin.FORMATS))
def test_rows_of_other_kinds_are_not_claimed(name: str, row: dict[str, Any]) -> None:
    assert not plugin.format_named(name).detect(row)


@pytest.mark.parametrize("name", plugin.names(plugin.FORMATS))
def test_a_format_names_itself(name: str) -> None:
    found = plugin.format_named(name)
    assert found.name == name
    assert found.summary
    assert found.columns
    assert found.trains_whole_text == (name == "text")


def test_messages_keep_what_the_template_may_want() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "3", "name": "f"},
        ],
        "tools": '[{"type": "function"}]',
    }
    made = read("messages", row)
    assert made.turns[0] == Turn("user", "ab")
    assert made.turns[1] == Turn("assistant", "", extra={"tool_calls": [call]})
    assert made.turns[2].as_message() == {"role": "tool", "content": "3", "name": "f"}
    assert made.tools == ({"type": "function"},)


def test_answers_can_be_marked_as_not_learned() -> None:
    marked = [
        {**ANSWERED, "weight": 0},
        {**ANSWERED, "weight": 1},
        {**ANSWERED, "train": False},
        {**ANSWERED, "train": True},
    ]
    assert trained(read("messages", {"messages": marked}).turns) == [False, True, False, True]
    assert all(not turn.extra for turn in read("messages", {"messages": marked}).turns)
    said = [{"from": "gpt", "value": "a", "train": False}]
    assert trained(read("sharegpt", {"conversations": said}).turns) == [False]


def test_alpaca_joins_and_remembers() -> None:
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert read("alpaca", row).turns == (
        Turn("system", "s"),
        Turn("user", "q0"),
        Turn("assistant", "a0"),
        Turn("user", "q\n\ni"),
        Turn("assistant", "a"),
    )
    assert read("alpaca", {"instruction": "q", "input": None, "output": "a"}).turns == DIALOGUE


def test_sharegpt_roles_and_system() -> None:
    said = [{"from": "human", "value": "q"}, {"from": "observation", "value": "o"}, {"from": "chatgpt", "value": "a"}]
    made = read("sharegpt", {"conversations": said, "system": "s"})
    assert [turn.role for turn in made.turns] == ["system", "user", "tool", "assistant"]


def test_prompt_and_completion_as_text_or_as_messages() -> None:
    made = read("prompt_completion", {"prompt": "p", "completion": "c"})
    assert (made.prompt, made.completion, made.turns) == ("p", "c", ())
    made = read("prompt_completion", {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]})
    assert trained(made.turns) == [False, True]
    assert getattr(plugin.format_named("prompt_completion"), "loss_setting") == "completion_only_loss"  # noqa: B009


@pytest.mark.parametrize(
    ("name", "row", "what", "fix"),
    [
        ("messages", {"mesages": []}, "no `messages`; it has `mesages`", "did you mean `mesages`"),
        ("messages", {"a": 1, "b": 2}, "it has `a`, `b`", "data.format"),
        ("messages", {"messages": []}, "empty list", "remove"),
        ("messages", {"messages": "[{}]"}, "text, not a list", "not a string"),
        ("messages", {"messages": ["hello"]}, r"messages\[0\]` is text, not an object", ""),
        ("messages", {"messages": [{"role": "user", "contents": "x"}]}, "no `content`", "did you mean `contents`"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "is null, not text", ""),
        ("messages", {"messages": [{"role": "gpt", "content": "x"}]}, "role` is `gpt`", "did you mean `assistant`"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image", "only text"),
        ("messages", {"messages": [{**ANSWERED, "weight": 0.5}]}, "weight` is 0.5", "0 .not learned. or 1"),
        ("messages", {"messages": [{**ANSWERED, "train": "no"}]}, "train` is 'no'", "true or false"),
        ("messages", {"messages": [ASKED], "tools": "{"}, "`tools` is text but not JSON", ""),
        ("sharegpt", {"conversation": []}, "no `conversations`", "did you mean `conversation`"),
        ("sharegpt", {"conversations": [{"from": "humann", "value": "x"}]}, "`humann`", "did you mean `human`"),
        ("sharegpt", {"conversations": [{"from": "human", "text": "x"}]}, "no `value`", ""),
        ("alpaca", {"instruction": "q", "ouput": "a"}, "no `output`", "did you mean `ouput`"),
        ("alpaca", {"instruction": "q", "output": 3}, "`output` is a number, not text", "quotes"),
        ("alpaca", {"instruction": " ", "output": "a"}, "both empty", "remove"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, r"history\[0\]", ""),
        ("prompt_completion", {"prompt": "p", "compltion": "c"}, "no `completion`", "did you mean `compltion`"),
        ("prompt_completion", {"prompt": "p", "completion": [ANSWERED]}, "text but `completion` is a list", "both"),
        ("text", {"txt": "t"}, "no `text`; it has `txt`", "did you mean `txt`"),
        ("text", {"text": None}, "`text` is null, not text", ""),
    ],
)
def test_what_is_wrong_with_a_row(name: str, row: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(RowError) as caught:
        read(name, row)
    assert re.search(what, caught.value.what)
    assert re.search(fix, caught.value.fix)


def test_formats_need_no_torch() -> None:
    code = (
        "import sys; from ftune import plugin; [plugin.format_named(n) for n in plugin.names('formats')];"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
