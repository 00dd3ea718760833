"""What is learned, told independently: the answers' own text and the mark that ends them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftune.data.template import render_conversation
from ftune.data.tokenize import IGNORED, Encoded, encode
from ftune.errors import DataError
from ftune.plugin import Conversation, RowError, Turn

ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: text.strip() and "<" not in text and "[" not in text
)
exchanges = st.lists(st.tuples(words, words, st.booleans()), min_size=1, max_size=4)
_tokenizers: dict[Any, Any] = {}


def encoded(
    tokenizer: Any, conversation: Conversation, *, answers_only: bool = True, max_length: int = 4096
) -> Encoded:
    rendered = render_conversation(tokenizer, conversation, answers_only=answers_only)
    return encode(tokenizer, [rendered], max_length=max_length)[0]


def learned(tokenizer: Any, row: Encoded) -> list[str]:
    """Return the texts of the unbroken stretches of learned tokens."""
    pairs = zip(row.input_ids.tolist(), row.labels.tolist(), strict=True)
    stretches = [list(pair) for wanted, pair in groupby(pairs, key=lambda pair: pair[1] != IGNORED) if wanted]
    assert all(token == label for stretch in stretches for token, label in stretch)
    return [tokenizer.decode([token for token, _ in stretch]) for stretch in stretches]


def conversation_of(spoken: list[tuple[str, str, bool]]) -> Conversation:
    turns = []
    for question, answer, trained in spoken:
        turns += [Turn("user", question), Turn("assistant", answer, trained=trained)]
    return Conversation(turns=tuple(turns))


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral"])
@given(spoken=exchanges)
@settings(max_examples=60, deadline=None)
def test_answers_and_their_end_marks_are_learned_and_nothing_else(
    family: str, trim_offsets: bool, spoken: Any, make_tokenizer: Any, templates: Any
) -> None:
    key = family, trim_offsets
    tokenizer = _tokenizers.setdefault(key, make_tokenizer(templates[family], trim_offsets=trim_offsets))
    row = encoded(tokenizer, conversation_of(spoken))
    trimmed = (answer if family == "chatml" else answer.strip() for _, answer, _ in spoken)
    space = " " if family == "mistral" else ""
    kept = [space + answer + ENDS[family] for answer, (_, _, trained) in zip(trimmed, spoken, strict=True) if trained]
    assert learned(tokenizer, row) == kept
    assert row.labels[0] == IGNORED
    assert row.stops or not kept


@given(spoken=exchanges)
@settings(max_examples=60, deadline=None)
def test_a_template_that_rewrites_history_still_shows_its_answers(
    spoken: Any, make_tokenizer: Any, templates: Any
) -> None:
    tokenizer = _tokenizers.setdefault("thinking", make_tokenizer(templates["thinking"]))
    kept = [answer.strip() + "<|im_end|>" for _, answer, trained in spoken if trained]
    if spoken[-1][2]:
        kept[-1] = "<think>\n\n</think>\n\n" + kept[-1]
    assert learned(tokenizer, encoded(tokenizer, conversation_of(spoken))) == kept


def test_a_question_that_holds_the_sentinel(make_tokenizer: Any, templates: Any) -> None:
    row = encoded(
        make_tokenizer(templates["thinking"]), conversation_of([("@@ANSWER-0@@", "b", True), ("c", "d", False)])
    )
    assert learned(make_tokenizer(), row) == ["b<|im_end|>"]


def test_thinking_that_the_template_drops_from_history_is_not_learned(make_tokenizer: Any, templates: Any) -> None:
    tokenizer = make_tokenizer(templates["thinking"])
    row = encoded(tokenizer, conversation_of([("a", "<think>why</think>b", True), ("c", "d", False)]))
    assert learned(tokenizer, row) == ["b<|im_end|>"]


def test_a_template_that_hides_answers_is_refused(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}\n{% endfor %}"
    )
    with pytest.raises(RowError, match="cannot find turn 2"):
        encoded(tokenizer, conversation_of([("a", "b", True), ("c", "d", True)]))


def test_a_newline_that_is_the_only_end_mark_is_learned(make_tokenizer: Any) -> None:
    plain = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    tokenizer = make_tokenizer(plain + "{% if add_generation_prompt %}assistant:{% endif %}")
    row = encoded(tokenizer, conversation_of([("a", "b", True), ("c", "d", True)]))
    assert learned(tokenizer, row) == ["b\n", "d\n"]
    assert not row.stops


@pytest.mark.parametrize("answer", [">", "_end|>", "a\n", " a ", "<b>x</b>"])
def test_an_answer_that_looks_like_the_end_mark_or_ends_in_blanks(answer: str, tokenizer: Any) -> None:
    assert learned(tokenizer, encoded(tokenizer, conversation_of([("0", answer, True)]))) == [answer + "<|im_end|>"]


def test_an_answer_before_any_question(tokenizer: Any) -> None:
    conversation = Conversation(turns=(Turn("assistant", "hello"), Turn("user", "a"), Turn("assistant", "b")))
    assert learned(tokenizer, encoded(tokenizer, conversation)) == ["hello<|im_end|>", "b<|im_end|>"]


def test_an_empty_answer_is_not_learned(tokenizer: Any) -> None:
    assert learned(tokenizer, encoded(tokenizer, conversation_of([("a", " ", True)]))) == []


def test_the_whole_conversation_is_learned_where_asked(tokenizer: Any) -> None:
    row = encoded(tokenizer, conversation_of([("a", "b", True)]), answers_only=False)
    assert row.supervised_tokens == len(row.input_ids) - 1
    assert row.labels[0] == IGNORED


def test_ids_are_those_of_inference(make_tokenizer: Any, templates: Any) -> None:
    """The template writes the begin mark, and the tokenizer, which has one too, must not add another."""
    tokenizer = make_tokenizer(templates["mistral"], begins=True)
    conversation = conversation_of([("the cat", "sat", True)])
    row = encoded(tokenizer, conversation)
    expected = tokenizer.apply_chat_template([turn.as_message() for turn in conversation.turns], return_dict=False)
    assert row.input_ids.tolist() == expected
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("begins", [True, False])
@given(prompt=words, completion=words)
@settings(max_examples=60, deadline=None)
def test_a_completion_and_the_end_are_learned(begins: bool, prompt: str, completion: str, make_tokenizer: Any) -> None:
    tokenizer = _tokenizers.setdefault(begins, make_tokenizer(None, begins=begins))
    row = encoded(tokenizer, Conversation(prompt=prompt, completion=completion))
    whole = ("<s>" if begins else "") + prompt + completion + "</s>"
    assert tokenizer.decode(row.input_ids.tolist()) == whole
    if not row.joined:
        # One token may come of bytes of both; then it is learned, and said so.
        assert learned(tokenizer, row) == [completion + "</s>"]
    assert row.stops


def test_a_token_across_the_border_is_learned_and_reported(tokenizer: Any) -> None:
    row = encoded(tokenizer, Conversation(prompt="the", completion=" cat"))
    assert not row.joined
    row = encoded(tokenizer, Conversation(prompt="what is the capi", completion="tal"))
    assert row.joined
    assert learned(tokenizer, row)[0].endswith("tal</s>")


@pytest.mark.parametrize("begins", [True, False])
def test_plain_text_is_learned_whole(begins: bool, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(None, begins=begins)
    row = encoded(tokenizer, Conversation(completion="the cat sat   "))
    assert row.labels[0] == IGNORED
    assert row.labels[1:].tolist() == row.input_ids[1:].tolist()
    assert tokenizer.decode(row.input_ids.tolist()) == ("<s>" if begins else "") + "the cat sat   </s>"


def test_marks_that_the_text_has_are_not_doubled(make_tokenizer: Any) -> None:
    row = encoded(make_tokenizer(None, begins=True), Conversation(completion="<s>the cat</s>"))
    assert row.input_ids.tolist().count(0) == 1
    assert row.input_ids.tolist().count(1) == 1


def test_cutting_is_at_the_end_and_counted(tokenizer: Any) -> None:
    whole = encoded(tokenizer, conversation_of([("a", "the cat sat on the mat", True)]))
    cut = encoded(tokenizer, conversation_of([("a", "the cat sat on the mat", True)]), max_length=12)
    assert cut.input_ids.tolist() == whole.input_ids.tolist()[:12]
    assert cut.labels.tolist() == whole.labels.tolist()[:12]
    assert cut.cut_tokens == len(whole.input_ids) - 12


def test_no_template_says_what_to_do(make_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data\.chat_template"):
        encoded(make_tokenizer(None), conversation_of([("a", "b", True)]))
