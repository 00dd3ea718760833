"""The data of a recipe as a trainer gets them: nothing lost unsaid, the same every time."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prepared_rows import EXPECTED, ROWS, answers, dialogue, plain, prepared

from ftune.data.faults import Faults
from ftune.data.parts import Part
from ftune.data.prepare import prepare
from ftune.errors import DataError
from ftune.plugin import Conversation, PlainText, Turn
from ftune.recipe.schema import Data


@pytest.mark.parametrize("stored", [True, False])
def test_rows_keep_their_order_and_are_counted(stored: bool, tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    made = prepared(tokenizer, tmp_path / "cache" if stored else None, train=write_rows(ROWS))
    assert made.format == "messages"
    assert made.eval is None
    assert answers(tokenizer, made.train) == EXPECTED
    counts = made.stored["train"][0].audit
    assert counts.rows == 60
    assert counts.tokens == sum(len(row["input_ids"]) for row in made.train) == made.train.num_tokens
    assert counts.supervised_tokens == sum(label != -100 for row in made.train for label in row["labels"])
    assert counts.longest == max(len(row["input_ids"]) for row in made.train)
    assert made.warnings == ()
    assert made.prompts[0] == Conversation((Turn("user", "what is 0?"),))
    assert len(made.prompts) == 3


def test_several_sources_follow_each_other(tokenizer: Any, write_rows: Any) -> None:
    made = prepared(tokenizer, train=[write_rows(ROWS[:5], "b.jsonl"), write_rows(ROWS[5:9], "a.jsonl")])
    assert answers(tokenizer, made.train) == EXPECTED[:9]


@pytest.mark.parametrize("streaming", [True, False])
def test_packing_holds_every_row_once(streaming: bool, tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    path = write_rows(ROWS)
    alone = prepared(tokenizer, train=path).train
    buffer = {"streaming": True, "shuffle_buffer_size": 20} if streaming else {}
    made = prepared(tokenizer, tmp_path, train=path, packing=True, max_length=128, **buffer).train
    rows = list(made) if not streaming else list(itertools.islice(made, 20))
    assert len(rows) < 30
    assert all(len(row["input_ids"]) <= 128 for row in rows)
    found = []
    for row in rows:
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        assert all(row["labels"][at] == -100 for at in starts)
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert list(row["position_ids"][start:end]) == list(range(end - start))
            found.append((list(row["input_ids"][start:end]), list(row["labels"][start:end])))
    every = [(list(row["input_ids"]), list(row["labels"])) for row in alone]
    if streaming:  # a stream has no end: what is packed are its rows, whole
        assert all(row in every for row in found)
    else:
        assert sorted(found) == sorted(every)


def test_a_share_is_held_out_by_the_seed(tokenizer: Any, write_rows: Any) -> None:
    path = write_rows(ROWS)
    first, again = (prepared(tokenizer, train=path, eval=0.1) for _ in range(2))
    other = prepared(tokenizer, train=path, eval=0.1, seed=2)
    train, held_out = answers(tokenizer, first.train), answers(tokenizer, first.eval)
    assert len(held_out) == 6
    assert sorted(train + held_out) == sorted(EXPECTED)
    assert answers(tokenizer, again.eval) == held_out
    assert answers(tokenizer, other.eval) != held_out
    assert [EXPECTED.index(answer) for answer in train] == sorted(EXPECTED.index(answer) for answer in train)
    assert first.prompts[0] == Conversation((Turn("user", f"what is {EXPECTED.index(held_out[0])}?"),))


def test_rows_are_counted_once_for_a_share_held_out(
    tokenizer: Any, write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(ROWS)
    first = prepared(tokenizer, tmp_path, train=path, eval=0.1)
    with monkeypatch.context() as patched:
        patched.setattr("ftune.data.parts.Part.rows", reads_few)
        again = prepared(tokenizer, tmp_path, train=path, eval=0.1)
    assert answers(tokenizer, again.eval) == answers(tokenizer, first.eval)
    # Other rows under the same name are other rows.
    write_rows([*ROWS, *ROWS])
    assert len(prepared(tokenizer, tmp_path, train=path, eval=0.1).eval) == 12


def reads_few(part: Part, faults: Faults, rows: Any = Part.rows) -> Any:
    """Yield a part's rows, and fail where more than what prompts are taken from are wanted."""
    for at, row in enumerate(rows(part, faults)):
        assert at < 5, "every row was read again"
        yield row


def test_a_prompt_brings_its_tools(tokenizer: Any, write_rows: Any) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    made = prepared(tokenizer, train=write_rows([{**row, "tools": tools} for row in ROWS[:3]]))
    assert made.prompts[0] == Conversation((Turn("user", "what is 0?"),), tools=tuple(tools))


def test_a_small_share_is_one_row_and_one_row_has_no_share(tokenizer: Any, write_rows: Any) -> None:
    assert len(prepared(tokenizer, train=write_rows(ROWS[:3]), eval=0.01).eval) == 1
    with pytest.raises(DataError, match="there is only 1"):
        prepared(tokenizer, train=write_rows(ROWS[:1]), eval=0.5)


def test_the_cache_is_used_again_and_only_for_the_same(
    make_tokenizer: Any, templates: Any, write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = tmp_path / "cache", write_rows(ROWS)
    wanted = {"train": path, "packing": True, "max_length": 128}
    first = prepared(make_tokenizer(), cache, **wanted)
    files = list(cache.glob("*.arrow"))
    assert len(files) == 1
    made = files[0].stat().st_mtime_ns
    monkeypatch.setattr("ftune.data.prepare.outcomes", None)
    again = prepared(make_tokenizer(), cache, **wanted)
    for one, other in zip(again.train, first.train, strict=True):
        assert all((one[column] == other[column]).all() for column in one)
    assert again.stored["train"][0].audit == first.stored["train"][0].audit
    assert again.warnings == first.warnings
    assert files[0].stat().st_mtime_ns == made
    monkeypatch.undo()
    prepared(make_tokenizer(templates["llama3"]), cache, **wanted)
    assert len(list(cache.glob("*.arrow"))) == 2
    prepared(make_tokenizer(), cache, **{**wanted, "max_length": 120})
    assert len(list(cache.glob("*.arrow"))) == 3


PAIRS = [{"prompt": f"what is {n}?", "completion": " it is" + " the cat" * (1 + n % 7)} for n in range(60)]


def a_word(tokenizer: Any) -> None:
    tokenizer.add_tokens(["cat"])


def another_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|im_end|>"


@pytest.mark.parametrize(
    "change",
    [
        a_word,
        another_end,
        {"max_length": 14},
        {"completion_only_loss": False},
        {"seed": 2},
        {"eval": 0.2},
        {"max_train_samples": 10},
        {"max_eval_samples": 2},
    ],
    ids=lambda change: getattr(change, "__name__", str(change)),
)
def test_the_cache_gives_what_no_cache_gives(change: Any, make_tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"train": write_rows(PAIRS), "eval": 0.1}
    before = prepared(make_tokenizer(), tmp_path / "cache", **wanted)
    tokenizer = make_tokenizer()
    if callable(change):
        change(tokenizer)
    else:
        wanted |= change
    found, fresh = (prepared(tokenizer, cache, **wanted) for cache in (tmp_path / "cache", None))
    assert plain(found) == plain(fresh)
    assert [each.audit for each in found.stored["train"]] == [each.audit for each in fresh.stored["train"]]
    assert plain(found) != plain(before)


def test_the_cache_knows_changed_contents(tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    path = write_rows(ROWS)
    prepared(tokenizer, tmp_path / "cache", train=path)
    # Another text of the same length in the same file.
    write_rows([dialogue("what is 9?", "it is 9"), *ROWS[1:]])
    assert answers(tokenizer, prepared(tokenizer, tmp_path / "cache", train=path).train)[0] == "it is 9<|im_end|>"


def test_a_broken_cache_file_is_made_anew(tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    cache, path = tmp_path / "cache", write_rows(ROWS)
    prepared(tokenizer, cache, train=path)
    next(cache.glob("*.arrow")).write_bytes(b"nonsense")
    assert answers(tokenizer, prepared(tokenizer, cache, train=path).train) == EXPECTED


def test_a_failed_start_leaves_nothing_in_the_cache(tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepared(tokenizer, tmp_path / "cache", train=write_rows([*ROWS, {"mesages": []}]))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_bad_rows_are_named_together(tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines[3], lines[40], lines[50] = '{"mesages": []}', "{bad", '{"messages": "x"}'
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        prepared(tokenizer, train=str(path))
    assert [str(problem.where) for problem in caught.value.problems] == [f"{path}:4", f"{path}:41:2", f"{path}:51"]
    assert "did you mean `mesages`" in caught.value.problems[0].fix
    assert '{"messages": [{"role": "user"' in caught.value.problems[0].why


def test_what_the_template_refuses_is_named(make_tokenizer: Any, templates: Any, write_rows: Any) -> None:
    rows = [*ROWS[:2], {"messages": [{"role": "system", "content": "s"}, *ROWS[2]["messages"]]}]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*System role not supported"):
        prepared(make_tokenizer(templates["gemma"]), train=write_rows(rows))


def test_conversations_need_a_template_which_may_come_from_a_file(
    make_tokenizer: Any, templates: Any, write_rows: Any, tmp_path: Path
) -> None:
    tokenizer, path = make_tokenizer(None), write_rows(ROWS)
    with pytest.raises(DataError, match=r"has no chat template.*data\.chat_template"):
        prepared(tokenizer, train=path)
    (tmp_path / "own.jinja").write_text(templates["chatml"])
    assert (
        answers(tokenizer, prepared(tokenizer, train=path, chat_template=str(tmp_path / "own.jinja")).train) == EXPECTED
    )
    assert tokenizer.chat_template == templates["chatml"]
    with pytest.raises(DataError, match="cannot read the chat template"):
        prepared(tokenizer, train=path, chat_template=str(tmp_path / "none.jinja"))


def test_cut_and_dropped_rows_are_said(tokenizer: Any, write_rows: Any) -> None:
    rows = [*ROWS[:4], dialogue("cat " * 80, "no"), dialogue("q", "the cat " * 40), dialogue("q", "")]
    made = prepared(tokenizer, train=write_rows(rows), max_length=60)
    counts = made.stored["train"][0].audit
    assert (counts.rows, counts.left_out) == (5, 2)
    assert counts.counts == {"cut": 1, "no-answer": 1, "answer-cut-off": 1, "empty-answer": 1}
    assert counts.cut_tokens > 20
    assert len(made.train) == 5
    assert any(re.search(r"1 of 7 rows are longer than data.max_length and were cut", text) for text in made.warnings)
    assert sum("left out" in text for text in made.warnings) == 2


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([dialogue("cat " * 40, "no")] * 2, {"max_length": 20}, r"none of the 2 rows.*raise data\.max_length"),
        ([{"messages": [{"role": "user", "content": "q"}]}], {}, "none of the 1 rows.*assistant turns are missing"),
        ([{"question": "q", "label": "yes"}], {}, r"rows\.jsonl:1: no format fits .* `question`, `label`.*alpaca:"),
        ([{**ROWS[0], "conversations": []}], {}, "fits several formats: messages, sharegpt"),
        ([{"a": 1}], {"format": "mesages"}, "there is no data format `mesages`"),
        (ROWS, {"whole": True}, "the rows are `messages`, but this objective learns plain text"),
    ],
)
def test_nothing_to_learn_from(
    rows: Any, settings: dict[str, Any], message: str, tokenizer: Any, write_rows: Any
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tokenizer, train=write_rows(rows), **settings)


def test_streaming_gives_the_same_rows_in_the_seeds_order(tokenizer: Any, write_rows: Any) -> None:
    wanted = {"train": write_rows(ROWS), "streaming": True, "shuffle_buffer_size": 20, "eval": 0.1}
    first = prepared(tokenizer, **wanted)
    count = 3 * (len(ROWS) - len(first.eval))
    train = answers(tokenizer, itertools.islice(first.train, count))
    assert train == answers(tokenizer, itertools.islice(prepared(tokenizer, **wanted).train, count))
    held_out = answers(tokenizer, first.eval)
    assert set(train) == set(EXPECTED) - set(held_out)
    # Pass after pass: what the buffer still holds at the end is all that may be missing from an equal count.
    assert sum(abs(train.count(answer) - 3) for answer in set(train)) <= 2 * 20
    assert train != sorted(train, key=EXPECTED.index)
    assert "train" not in first.stored


def test_a_bad_row_in_a_stream_is_named(tokenizer: Any, write_rows: Any) -> None:
    made = prepared(tokenizer, train=write_rows([*ROWS * 34, {"mesages": []}]), streaming=True)
    with pytest.raises(DataError, match=r"rows\.jsonl:2041"):
        list(made.train)
    with pytest.raises(DataError, match=r"rows\.jsonl:3"):
        prepared(tokenizer, train=write_rows([*ROWS[:2], {"mesages": []}]), streaming=True)


def test_plain_text_and_completions(make_tokenizer: Any, write_rows: Any) -> None:
    tokenizer = make_tokenizer(None)
    made = prepared(tokenizer, train=write_rows([{"text": "the cat sat on the mat and on the mat it sat"}]), whole=True)
    assert made.prompts == (PlainText("the cat sat on the mat and on"),)
    row = made.train[0]
    assert list(row["labels"][1:]) == list(row["input_ids"][1:])
    pairs = write_rows([{"prompt": "the cat", "completion": " sat"}])
    assert answers(tokenizer, prepared(tokenizer, train=pairs).train) == [" sat</s>"]
    assert prepared(tokenizer, train=pairs).prompts == (PlainText("the cat"),)
    whole = prepared(tokenizer, train=pairs, completion_only_loss=False).train[0]
    assert list(whole["labels"][1:]) == list(whole["input_ids"][1:])
    # The other switch is for conversations and leaves completions alone.
    assert answers(tokenizer, prepared(tokenizer, train=pairs, assistant_only_loss=False).train) == [" sat</s>"]


def test_the_whole_conversation_where_asked(tokenizer: Any, write_rows: Any) -> None:
    row = prepared(tokenizer, train=write_rows(ROWS), assistant_only_loss=False).train[0]
    assert list(row["labels"][1:]) == list(row["input_ids"][1:])
    row = prepared(tokenizer, train=write_rows(ROWS), completion_only_loss=False).train[0]
    assert list(row["labels"]).count(-100) > 5


def test_what_will_surprise_is_said(make_tokenizer: Any, tokenizer: Any, write_rows: Any) -> None:
    path = write_rows(ROWS)
    markless = make_tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 60 of 60 rows teach no end mark"):
        prepared(markless, train=path)
    assert prepared(markless, train=path, audit_ignore=["never-stops"]).warnings == ()
    pairs = write_rows([{"prompt": "what is the capi", "completion": "tal"}])
    assert any("a token that spans" in warning for warning in prepared(tokenizer, train=pairs).warnings)


def test_half_a_letter_is_found_by_its_row(tokenizer: Any, tmp_path: Path) -> None:
    rows = [dialogue("hi", "ho"), dialogue("hi \ud83d", "ho")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows.jsonl:2.*surrogate"):
        prepared(tokenizer, train=str(path))


def test_a_slow_tokenizer_is_refused_before_the_cache_asks_it(write_rows: Any, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(DataError, match="ByT5Tokenizer does not tell"):
        prepared(ByT5Tokenizer(), tmp_path / "cache", train=write_rows(ROWS))


def test_a_cache_that_cannot_be_written_is_done_without(tokenizer: Any, write_rows: Any) -> None:
    made = prepared(tokenizer, Path("/proc/nowhere/tokens"), train=write_rows(ROWS))
    assert answers(tokenizer, made.train) == EXPECTED


def test_the_first_rows_of_a_mix_are_a_mix(tokenizer: Any, write_rows: Any) -> None:
    sources = [
        {"path": write_rows(ROWS[:40], "a.jsonl"), "weight": 1},
        {"path": write_rows(ROWS[40:], "b.jsonl"), "weight": 1},
    ]
    made = prepared(tokenizer, train=sources, max_train_samples=10).train
    assert len(made) == 10
    assert sorted(int(row["source"]) for row in made) == [0] * 5 + [1] * 5


def test_a_stream_goes_round_its_first_rows(tokenizer: Any, write_rows: Any) -> None:
    made = prepared(tokenizer, train=write_rows(ROWS), streaming=True, max_train_samples=5, shuffle_buffer_size=2).train
    assert set(answers(tokenizer, itertools.islice(made, 40))) == set(EXPECTED[:5])


def test_only_the_rows_that_a_stream_takes_are_looked_at(tokenizer: Any, write_rows: Any) -> None:
    path = write_rows([*ROWS[:5], {"mesages": []}])
    made = prepared(tokenizer, train=path, streaming=True, max_train_samples=5)
    assert made.first_rows[0].audit.rows == 5


def test_packing_is_shown_as_it_will_be_trained(tokenizer: Any, write_rows: Any) -> None:
    from ftune.preview.packing import packed_sequences

    sources = [
        {"path": write_rows(ROWS[:6], "a.jsonl"), "weight": 1},
        {"path": write_rows(ROWS[6:30], "b.jsonl"), "weight": 1},
    ]
    data = Data(train=sources, packing=True, max_length=128)
    made = prepare(data, tokenizer=tokenizer, seed=1, cache=None)
    recipe = SimpleNamespace(data=data)
    shown = packed_sequences(made.stored["train"], made.train, recipe, tokenizer, len(made.train))  # type: ignore[arg-type]
    ids = [[token.id for row in one.rows for token in row.texts[0].tokens] for one in shown]
    assert ids == [row["input_ids"].tolist() for row in made.train]


def test_a_row_of_two_texts_is_drawn_whole(tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    path = write_rows([{"prompt": "the cat", "chosen": " sat", "rejected": " ran off"}])
    for cache in (tmp_path / "cache", None):
        learns = frozenset({"preference"})
        made = prepare(Data(train=path), tokenizer=tokenizer, seed=1, cache=cache, learns=learns)
        (row,) = list(made.train)
        learned = [[label for label in row[f"{view}_labels"] if label != -100] for view in ("chosen", "rejected")]
        assert [tokenizer.decode(labels) for labels in learned] == [" sat</s>", " ran off</s>"]
