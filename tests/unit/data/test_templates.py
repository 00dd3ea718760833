"""Golden masks of the families users have, and the same for any conversation: words, end mark, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import re
import unicodedata
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, FOLDER, Family, tokenizer_of
from tokenizers import pre_tokenizers

import ftune
from ftune import plugin
from ftune.data.template import Rendered, render, render_conversation
from ftune.data.tokenize import Encoded, encode
from ftune.errors import RecipeError
from ftune.losses import IGNORED
from ftune.models import generate
from ftune.plugin import Conversation, RowError, Turn

CONVERSATIONS = json.loads((FOLDER / "conversations.json").read_text(encoding="utf-8"))
KINDS = [(name, kind) for name, family in FAMILIES.items() for kind in family.kinds]


def golden(name: str) -> dict[str, str]:
    """Return the expected texts of a family, what is learned between {+ and +}."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    parts = re.split(r"^=== (\w+)\n", text, flags=re.MULTILINE)[1:]
    return {case: body.removesuffix("\n") for case, body in zip(parts[::2], parts[1::2], strict=True)}


CASES = [(name, case, kind) for name, family in FAMILIES.items() for case in golden(name) for kind in family.kinds]


def conversation_of(case: str) -> Conversation:
    return plugin.format_named("messages").read(CONVERSATIONS[case])


def spelled(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def learned(tokenizer: Any, row: Encoded) -> list[str]:
    """Return the texts of the unbroken stretches of learned tokens."""
    pairs = zip(row.input_ids.tolist(), row.labels.tolist(), strict=True)
    stretches = [list(pair) for wanted, pair in groupby(pairs, key=lambda pair: pair[1] != IGNORED) if wanted]
    assert all(token == label for stretch in stretches for token, label in stretch)
    return [spelled(tokenizer, [token for token, _ in stretch]) for stretch in stretches]


def encoded(tokenizer: Any, conversation: Conversation, **how: Any) -> Encoded:
    rendered = render_conversation(tokenizer, conversation, answers_only=True, **how)
    return encode(tokenizer, [rendered], max_length=None)[0]


@pytest.mark.parametrize(("name", "case", "kind"), CASES)
def test_golden(name: str, case: str, kind: str) -> None:
    tokenizer, expected = tokenizer_of(name, kind), golden(name)[case]
    if expected.startswith("! "):
        with pytest.raises(RowError) as refused:
            render_conversation(tokenizer, conversation_of(case), answers_only=True)
        assert expected.removeprefix("! ") in f"{refused.value.what}; {refused.value.fix}"
        return
    expected = expected.replace("{today}", f"{datetime.date.today():%Y-%m-%d}")
    rendered = render_conversation(tokenizer, conversation_of(case), answers_only=True)
    assert rendered.text == expected.replace("{+", "").replace("+}", "")
    stretches = re.findall(r"\{\+(.*?)\+\}", expected, flags=re.DOTALL)
    if FAMILIES[name].greedy:
        stretches = [text.replace("|>\n", "|>") for text in stretches]
    made = encode(tokenizer, [rendered], max_length=None)[0]
    assert learned(tokenizer, made) == stretches
    assert made.stops
    # The merged tokenizers know no borders of words: "assistant to=" is joined in them.
    assert not made.joined or (name, kind) in (("gptoss", "merged"), ("gptoss", "trimmed"))


def texts(family: Family) -> st.SearchStrategy[str]:
    """Return any text: blanks at its ends, letters of all kinds, and what looks like a mark."""
    alike = [*family.marks, *family.words, "<think>", "</think>", "@@ANSWER-0@@", "### Response:\n", "\n\n", " ", "\t"]
    alike += [mark[:-1] for mark in family.marks] + [mark[1:] for mark in family.marks]
    alike += ["e\u0301", "\u0338", "\U0001f600"]
    letters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x1c\x1d\x1e\x1f\x85"), max_size=6)
    parts = st.lists(st.one_of(letters, st.sampled_from(alike), st.sampled_from(["Yes.", "a", "the"])), max_size=4)
    return st.one_of(parts.map("".join), st.sampled_from(["", " ", "Hello.", "18 C"]))


@st.composite
def conversations(draw: Any, family: Family) -> Conversation:
    """Draw a conversation of a shape that the family admits."""
    text = texts(family).map(lambda said: unicodedata.normalize("NFC", said))
    turns: list[Turn] = []
    if family.system and draw(st.booleans()):
        turns.append(Turn("system", draw(text)))
    tools: tuple[Any, ...] = ()
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("user", draw(text)))
        if family.calls and draw(st.booleans()):
            turns += draw(calls(text, family))
            tools = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
        for _ in range(1 if family.alternates else draw(st.integers(1, 2))):
            turns.append(Turn("assistant", draw(text), trained=draw(st.booleans()), extra=draw(thinking(text, family))))
    if not family.alternates and draw(st.booleans()):
        turns.append(Turn("user", draw(text)))
    return Conversation(turns=tuple(turns), tools=tools)


def thinking(text: st.SearchStrategy[str], family: Family) -> st.SearchStrategy[dict[str, str]]:
    if not family.thinks:
        return st.just({})
    key = "thinking" if family.name == "gptoss" else "reasoning_content"
    return st.one_of(st.just({}), text.map(lambda thought: {key: thought}))


@st.composite
def calls(draw: Any, text: st.SearchStrategy[str], family: Family) -> list[Turn]:
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": draw(text)}}}
    extra = {**draw(thinking(text, family)), "tool_calls": [call]}
    result = Turn("tool", draw(text), extra={"name": "weather", "tool_call_id": "call00001"})
    return [Turn("assistant", draw(st.one_of(st.just(""), text)), trained=draw(st.booleans()), extra=extra), result]


def expected_of(family: Family, turns: tuple[Turn, ...]) -> list[str]:
    """Return what is learned of a conversation: what each trained answer that says anything is written as."""
    said = []
    for index, turn in enumerate(turns):
        speaks = turn.content.strip() or turn.extra.get("tool_calls") or _thinks(family, turns, index)
        if turn.role == "assistant" and turn.trained and speaks and (text := family.said(turns, index)):
            said.append(text)
    return said


def _thinks(family: Family, turns: tuple[Turn, ...], index: int) -> bool:
    """Return whether an answer without content is written with what it thought."""
    thought = str(turns[index].extra.get("thinking" if family.name == "gptoss" else "reasoning_content") or "").strip()
    silent = (*turns[:index], dataclasses.replace(turns[index], extra={}), *turns[index + 1 :])
    return bool(thought) and family.said(turns, index) != family.said(silent, index)


def test_thinking_that_is_left_out_is_not_found_in_the_mark() -> None:
    """DeepSeek's template writes no thinking, and ends an empty answer with the mark that this thinking consists of."""
    family, tokenizer = FAMILIES["deepseek"], tokenizer_of("deepseek", "bytes")
    for mark in family.marks:
        turns = (Turn("user", ""), Turn("assistant", "", extra={"reasoning_content": mark}))
        assert learned(tokenizer, encoded(tokenizer, Conversation(turns=turns))) == []


@pytest.mark.parametrize(("name", "kind"), KINDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_words_and_end_mark_of_each_answer_are_learned_and_nothing_else(name: str, kind: str, data: Any) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name, kind)
    conversation = data.draw(conversations(family))
    row = encoded(tokenizer, conversation)
    assert learned(tokenizer, row) == expected_of(family, conversation.turns)
    if not family.greedy:
        text = render(tokenizer, conversation.turns, conversation.tools)
        whole = spelled(tokenizer, row.input_ids.tolist())
        assert whole.removeprefix(" ") == text.removeprefix(" ")


def turns_of(*said: tuple[str, str]) -> Conversation:
    return Conversation(turns=tuple(Turn(role, content) for role, content in said))


def test_only_the_last_answer_is_learned_where_asked() -> None:
    tokenizer = tokenizer_of("chatml", "bytes")
    assert learned(tokenizer, encoded(tokenizer, conversation_of("weight"), train_on_turns="last")) == [
        "Third.<|im_end|>"
    ]
    assert learned(tokenizer, encoded(tokenizer, conversation_of("open"), train_on_turns="last")) == [
        "First.<|im_end|>"
    ]


def test_the_last_answer_is_the_last_that_is_learned_at_all() -> None:
    tokenizer = tokenizer_of("chatml", "bytes")
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d", trained=False)]
    turns += [Turn("user", "e"), Turn("assistant", " ")]
    row = encoded(tokenizer, Conversation(turns=tuple(turns)), train_on_turns="last")
    assert learned(tokenizer, row) == ["b<|im_end|>"]


def with_template(name: str, template: str, kind: str = "bytes") -> Any:
    tokenizer = copy.deepcopy(tokenizer_of(name, kind))
    tokenizer.chat_template = template
    return tokenizer


def test_a_refused_role_is_named_with_a_way_out() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = with_template("gemma", refuses + FAMILIES["gemma"].template)
    with pytest.raises(RowError, match="refuses the role `system`: System role not supported") as refused:
        render_conversation(tokenizer, conversation_of("system"), answers_only=True)
    assert "at the head of the first user turn" in refused.value.fix


@pytest.mark.parametrize("answers_only", [True, False])
def test_a_turn_that_is_left_out_is_refused(answers_only: bool) -> None:
    silent = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    tokenizer = with_template("chatml", silent)
    # The answer says the same words, so that they are found in the text.
    conversation = turns_of(("system", "Yes"), ("user", "Hi"), ("assistant", "Yes!"))
    with pytest.raises(RowError, match="leaves out turn 1, of the role `system`"):
        render_conversation(tokenizer, conversation, answers_only=answers_only)


def test_a_call_that_is_left_out_is_refused() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    turns = (Turn("user", "Rome?"), Turn("assistant", "Wait.", extra={"tool_calls": [call]}))
    with pytest.raises(RowError, match="leaves out the call of `weather` in turn 2"):
        render_conversation(tokenizer_of("zephyr", "bytes"), Conversation(turns=turns), answers_only=True)


def test_what_the_template_changes_is_told() -> None:
    def told(name: str, case: str) -> tuple[bool, bool]:
        rendered = render_conversation(tokenizer_of(name, "bytes"), conversation_of(case), answers_only=True)
        return rendered.rewritten, rendered.unprompted

    assert told("chatml", "turns") == (False, False)
    assert told("qwen3", "turns") == (False, False)
    assert told("qwen3", "thinking") == (True, False)
    assert told("deepseek", "single") == (False, True)


def test_a_token_across_the_border_is_divided_as_generation_has_it() -> None:
    tokenizer = tokenizer_of("alpaca", "merged")
    conversation = turns_of(("user", "a"), ("assistant", "\n\nthe"))
    row = encoded(tokenizer, conversation)
    asked = tokenizer(render(tokenizer, conversation.turns[:1], add_generation_prompt=True))["input_ids"]
    whole = tokenizer(render(tokenizer, conversation.turns))["input_ids"]
    assert whole[: len(asked)] != asked, "no token spans the border, so that this shows nothing"
    assert row.joined
    assert row.input_ids.tolist()[: len(asked)] == asked
    assert learned(tokenizer, row) == ["\n\nthe</s>"]


def test_no_token_of_the_next_question_is_learned_without_an_end_mark() -> None:
    plain = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    for kind in ("merged", "trimmed"):
        tokenizer = with_template("alpaca", plain, kind)
        turns = (Turn("assistant", "a"), Turn("\n\n### Instruction", "b"), Turn("assistant", "the \n"))
        assert learned(tokenizer, encoded(tokenizer, Conversation(turns=(Turn("user", "x"), *turns)))) == [
            "a\n",
            "the \n\n",
        ]


def test_a_token_that_cannot_be_divided_is_learned_and_told() -> None:
    """Some tokenizers begin every stretch with a blank: divided, the text would be another."""
    tokenizer = copy.deepcopy(tokenizer_of("alpaca", "pieces"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    row = encode(tokenizer, [Rendered("xthe", ((2, 5),), templated=False)], max_length=None)[0]
    assert not row.joined
    row = encode(tokenizer, [Rendered("the", ((2, 4),), templated=False)], max_length=None)[0]
    assert row.joined
    assert spelled(tokenizer, row.input_ids.tolist()) == " the</s>"


def test_a_cut_answer_teaches_no_end_although_its_thinking_is_wrapped_in_marks() -> None:
    tokenizer = tokenizer_of("qwen3", "bytes")
    rendered = render_conversation(tokenizer, conversation_of("thinking"), answers_only=True, train_on_turns="last")
    whole = encode(tokenizer, [rendered], max_length=None)[0]
    assert whole.stops
    assert not encode(tokenizer, [rendered], max_length=len(whole.input_ids) - 2)[0].stops


@pytest.mark.parametrize("name", ["qwen3", "zephyr"])
def test_looking_for_a_sentinel_is_not_misled_by_thinking_that_is_dropped(name: str) -> None:
    """Zephyr's tokenizer does not know Qwen's marks, so that only the text can tell."""
    tokenizer = with_template(name, FAMILIES["qwen3"].template)
    turns = (Turn("user", "a"), Turn("assistant", "<think>@@ANSWER-0@@</think>b"), Turn("user", "c"))
    row = encoded(tokenizer, Conversation(turns=(*turns, Turn("assistant", "d", trained=False))))
    assert learned(tokenizer, row) == ["b<|im_end|>"]


def test_an_answer_that_may_not_come_last_ends_at_its_mark() -> None:
    refuses = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('who asks?') }}{% endif %}"
    tokenizer = with_template("chatml", refuses + FAMILIES["chatml"].template)
    assert learned(tokenizer, encoded(tokenizer, conversation_of("open"))) == ["First.<|im_end|>"]


def test_thinking_that_holds_the_answer_too_leaves_the_line_break_that_ends_it() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
        "{{ m.content }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    answer = Turn("assistant", "four", extra={"reasoning_content": "four?"})
    row = encoded(
        with_template("alpaca", template), Conversation(turns=(Turn("user", "2+2"), answer, Turn("user", "x")))
    )
    assert learned(tokenizer_of("alpaca", "bytes"), row) == ["(four?)four\n"]


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = tokenizer_of("alpaca", "trimmed")
    before = tokenizer.backend_tokenizer.to_str()
    encoded(tokenizer, turns_of(("user", "a"), ("assistant", "\n\nthe")))
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_fixed_day_changes_nothing_but_the_day() -> None:
    turns = conversation_of("single").turns
    for name in FAMILIES:
        tokenizer = tokenizer_of(name, "bytes")
        now = render(tokenizer, turns)
        assert render(tokenizer, turns, today="2001-02-03") == now.replace(f"{datetime.date.today()}", "2001-02-03")


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_is_asked_with_the_tokens_that_training_put_before_the_answer(name: str) -> None:
    kind = FAMILIES[name].kinds[-1]
    tokenizer, conversation = tokenizer_of(name, kind), conversation_of("turns")
    row = encoded(tokenizer, conversation, train_on_turns="last")
    asked = generate.encode(tokenizer, dataclasses.replace(conversation, turns=conversation.turns[:-1]))[0].tolist()
    if name == "deepseek":
        assert asked.pop() == tokenizer("\n")["input_ids"][0]
        assert tokenizer.decode(asked.pop()) == "<think>"
    assert row.input_ids.tolist()[: len(asked)] == asked
    assert (row.labels[: len(asked)] == IGNORED).all()
    assert row.labels[len(asked)] != IGNORED


def test_chat_says_which_role_its_template_refuses() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = with_template("gemma", refuses + FAMILIES["gemma"].template)
    with pytest.raises(RecipeError, match="refuses the role `system`"):
        generate.encode(tokenizer, Conversation(conversation_of("system").turns[:2]))


def test_nothing_else_renders() -> None:
    root = Path(ftune.__file__).parent
    callers = [path for path in root.rglob("*.py") if "apply_chat_template(" in path.read_text(encoding="utf-8")]
    assert callers == [root / "data" / "template.py"]
