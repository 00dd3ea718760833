"""What is odd about rows: each finding where it holds and nowhere else; copies as counting them one by one has them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import template_families

from ftune import plugin
from ftune.data import duplicates, overview, tokens
from ftune.data.audit import Audit, RowChecks
from ftune.data.faults import Faults
from ftune.data.lengths import length_summary, padding
from ftune.data.parts import Encoding, Part
from ftune.data.prepare import LOOKED_AT, prepare
from ftune.data.rows import Row
from ftune.data.workers import outcomes
from ftune.errors import DataError
from ftune.findings import ROW_FINDINGS, SET_FINDINGS, known_findings
from ftune.recipe.schema import Data, Training

SHIPPED = Path(__file__).parents[3] / "recipes" / "data"


def chat(*said: str, **first: Any) -> dict[str, Any]:
    turns = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), said)]
    turns[0] |= first
    return {"messages": turns}


def pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def kinds_of(tokenizer: Any, row: dict[str, Any], *, format: str = "messages", length: int = 200) -> list[str]:
    chosen = plugin.format_named(format)
    encoding = Encoding(chosen, tokenizer, True, length)
    faults = Faults(most=1)
    (worked, *_) = encoding.worked([Row("rows.jsonl", 1, row)], faults)
    return RowChecks(encoding).kinds(worked)


GOOD = chat("What is the capital of France?", "Paris.")
END_LESS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TWICE = "<s><s>{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
ROWS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("no-answer", chat("Hello?"), GOOD, {}),
    ("answer-cut-off", chat("Hello? " * 40, "Hi"), chat("Hello? " * 10, "Hi"), {"length": 100}),
    ("cut", chat("Hello?", "Hi " * 80), chat("Hello?", "Hi " * 8), {"length": 100}),
    ("empty-answer", chat("Hello?", " ", "And?", "Hi"), chat("Hello?", "Ho", "And?", "Hi"), {}),
    ("broken-text", chat("Caf\u00c3\u00a9?", "Hi"), chat("Caf\u00e9, N\u00c3O?", "\u4f60\u597d \u20ac 5"), {}),
    ("broken-text", chat("A\ufffdB?", "Hi"), chat("\x1b[1m in colour, a page \x0c\tbreak", "Hi\n"), {}),
    ("broken-text", chat("A\x00B?", "Hi"), GOOD, {}),
    ("mark-in-text", chat("Is </s> a mark?", "Hi"), chat("Is < / s > a mark?", "Hi"), {}),
    ("joined", pair("the ", "cat"), pair("the", " cat"), {"format": "prompt_completion"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "bad", "good", "more"), ROWS, ids=[f"{row[0]}-{at}" for at, row in enumerate(ROWS)])
def test_a_bad_row_is_found_and_a_good_one_is_not(kind: str, bad: Any, good: Any, more: Any, tokenizer: Any) -> None:
    assert kind in kinds_of(tokenizer, bad, **more)
    assert kinds_of(tokenizer, good, **more) == []


def test_a_template_without_end_mark_and_one_that_begins_twice(make_tokenizer: Callable[..., Any]) -> None:
    assert kinds_of(make_tokenizer(END_LESS), GOOD) == ["never-stops"]
    assert "begins-twice" in kinds_of(make_tokenizer(TWICE), GOOD)
    # What was cut off cannot say whether it would have ended.
    assert kinds_of(make_tokenizer(END_LESS), chat("Hi", "what is the capital " * 9), length=30) == ["cut"]


def test_padding_is_only_told_where_it_stands_for_nothing_else(make_tokenizer: Callable[..., Any]) -> None:
    own = make_tokenizer()
    own.pad_token = "<bos>"
    assert "pad-learned" in kinds_of(own, chat("Hello?", "a <bos> b"))
    assert "pad-learned" not in kinds_of(own, chat("Hello <bos>?", "a"))
    assert "pad-learned" not in kinds_of(make_tokenizer(), chat("Hello?", "a </s> b"))  # pads with its end token


def test_an_answer_that_the_template_writes_otherwise(templates: dict[str, str], make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(templates["thinking"])
    assert "rewritten" in kinds_of(tokenizer, chat("Hello?", "<think>\nhm\n</think>\n\nHi", "And?", "Ho"))
    assert "rewritten" not in kinds_of(tokenizer, chat("Hello?", "Hi", "And?", "Ho"))


def test_prompts_teach_nothing_and_are_not_told_so(tokenizer: Any) -> None:
    assert kinds_of(tokenizer, {"prompt": [{"role": "user", "content": "Hello?"}]}, format="prompt") == []


def test_plain_text_of_a_tokenizer_without_an_end_mark(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    assert kinds_of(tokenizer, {"text": "the cat sat"}, format="text") == []


@pytest.mark.parametrize("family", template_families.FAMILIES)
def test_shipped_rows_raise_no_alarm(family: str) -> None:
    tokenizer = template_families.tokenizer_of(family, template_families.FAMILIES[family].kinds[-1])
    encoding = Encoding(plugin.format_named("messages"), tokenizer, True, 4096)
    part = Part("train", str(SHIPPED / "definitions.eval.jsonl"), "train", most=60)
    ((_, audit, problems),) = outcomes(part.rows(Faults()), encoding, (), 1)
    assert problems == []
    # DeepSeek's generation prompt opens a thought, which rows without thoughts do not have.
    assert audit.counts == ({"unprompted": 60} if family == "deepseek" else {})


def test_numbers_are_those_of_the_rows(tokenizer: Any, write_rows: Any) -> None:
    rows = [chat(f"what is {number}?", "the cat " * number) for number in range(30)]
    made = prepare(Data(train=write_rows(rows), max_length=60), tokenizer=tokenizer, seed=0, cache=None)
    audit = made.stored["train"][0].audit
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    kept = lengths[1:]  # the first answer is empty
    assert (audit.rows, audit.left_out) == (29, 1)
    assert audit.longest == max(lengths)
    assert audit.cut_tokens == sum(max(0, length - 60) for length in kept)
    assert audit.tokens == sum(min(60, length) for length in kept)
    assert audit.whole == sum(length <= 60 for length in kept)
    assert audit.counts["cut"] == sum(length > 60 for length in kept)
    again = Audit.from_dict(json.loads(json.dumps(audit.as_dict())))
    assert again == audit


def test_what_holds_for_every_row_stops_the_run(make_tokenizer: Any, write_rows: Any) -> None:
    rows = [GOOD, chat("Hello?", "Hi " * 100)]
    settings: dict[str, Any] = {"tokenizer": make_tokenizer(END_LESS), "seed": 0, "cache": None}
    data = Data(train=write_rows(rows), max_length=60)
    with pytest.raises(DataError) as caught:
        prepare(data, **settings)
    (problem,) = caught.value.problems
    assert problem.rule == "never-stops"
    assert str(problem.where).endswith("rows.jsonl:1")
    assert "audit_ignore: [never-stops]" in problem.fix
    assert [each.rule for each in prepare(data, **settings, strict=False).fatal] == ["never-stops"]
    ignoring = data.model_copy(update={"audit_ignore": ["never-stops"]})
    assert any("(cut)" in line for line in prepare(ignoring, **settings).warnings)


def test_every_finding_has_a_name_of_its_own() -> None:
    listed = [finding.kind for finding in (*ROW_FINDINGS, *SET_FINDINGS)]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(known_findings())


def stored(tokenizer: Any, rows: list[Any], path: str = "rows.jsonl") -> tokens.TokenFile:
    encoding = Encoding(plugin.format_named("messages"), tokenizer, True, 512)
    every = (Row(path, number, row) for number, row in enumerate(rows, start=1))
    kept = [each for done, _, _ in outcomes(every, encoding, (path,), 1) for each in done]
    return tokens.write(None, "rows", ("",), tokens.id_type(tokenizer), kept)


def shingles(row: numpy.ndarray, skipped: int) -> set[tuple[int, ...]]:
    ids = row[skipped:].tolist()
    return {tuple(ids[at : at + 5]) for at in range(max(1, len(ids) - 4))}


@pytest.fixture(scope="module")
def real_rows() -> list[Any]:
    """Return rows of real text, some of them changed a little, or much, or not at all."""
    lines = (SHIPPED / "definitions.train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:260]]
    generator = numpy.random.default_rng(4)
    for number in range(120):
        asked, answered = (turn["content"] for turn in rows[int(generator.integers(0, 200))]["messages"])
        words = answered.split()
        for at in generator.integers(0, len(words), int(generator.integers(0, 4))):
            words[at] = f"word{number}"
        rows.append(chat(asked, " ".join(words)))
    return [*rows, rows[3], rows[3], rows[270]]


@pytest.fixture(scope="module")
def merged() -> Any:
    return template_families.tokenizer_of("chatml", "merged")


def test_copies_are_those_that_comparing_all_pairs_finds(merged: Any, real_rows: list[Any]) -> None:
    file = stored(merged, real_rows)
    ids = [file.row(at).input_ids for at in range(len(file))]
    found = duplicates.find_copies([file])["train"]
    first = {row.tobytes(): at for at, row in reversed(list(enumerate(ids)))}
    exact = {at for at, row in enumerate(ids) if first[row.tobytes()] != at}
    skipped = _shared_beginnings([row for at, row in enumerate(ids) if at not in exact])
    single = [at for at in range(len(ids)) if at not in exact]
    sets = {at: (skip.tobytes(), shingles(ids[at], len(skip))) for at, skip in zip(single, skipped, strict=True)}
    near = {
        later
        for earlier, later in itertools.combinations(single, 2)
        if sets[earlier][0] == sets[later][0]
        and len(sets[earlier][1] & sets[later][1]) / len(sets[earlier][1] | sets[later][1]) >= 0.8
    }
    assert len(exact) >= 3
    assert len(near) >= 10
    assert {row for row, _ in found.pairs["duplicate"]} == exact
    assert {row for row, _ in found.pairs["near-duplicate"]} == near
    assert found.counts == {"duplicate": len(exact), "near-duplicate": len(near)}


def _shared_beginnings(rows: list[numpy.ndarray]) -> list[numpy.ndarray]:
    """Return the longest beginning of each row that a tenth of the rows share."""
    enough = max(32, len(rows) // 10)
    counts = Counter(row[:depth].tobytes() for row in rows for depth in range(1, len(row) + 1))
    return [
        next(row[:depth] for depth in range(len(row), -1, -1) if not depth or counts[row[:depth].tobytes()] >= enough)
        for row in rows
    ]


def test_rows_of_evaluation_that_are_learned_too(merged: Any, real_rows: list[Any]) -> None:
    longest = max(real_rows[:150], key=lambda row: len(row["messages"][1]["content"]))
    nearly = chat(longest["messages"][0]["content"], longest["messages"][1]["content"] + " So it is.")
    train, evaluation = stored(merged, real_rows[:200]), stored(merged, [*real_rows[190:260], nearly])
    found = duplicates.find_copies([train], [evaluation])
    assert found["eval"].counts == {"train-in-eval": 11}
    exactly = [(200 + at, 190 + at) for at in range(10)]
    assert found["eval"].pairs["train-in-eval"] == [*exactly, (270, real_rows.index(longest))]
    assert found["eval"].rows == 71
    assert found == duplicates.find_copies([train], [evaluation])


def test_an_instruction_that_many_rows_share_makes_them_no_copies(merged: Any) -> None:
    asked = "Say in one word whether the following review is friendly. Do not explain your answer. Review: "
    reviews = [f"{asked}{number * 7919} {number}{number}" for number in range(100)]
    file = stored(merged, [chat(text, "yes") for text in reviews])
    assert duplicates.find_copies([file])["train"].counts == {}
    few = stored(merged, [chat(text, "yes") for text in reviews[:5]])
    assert duplicates.find_copies([few])["train"].counts == {}


def test_a_crowd_of_like_rows_is_found_without_comparing_all(merged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"word{number % 17}" for number in range(60)]
    rows = [
        chat("Go on", " ".join([*words[: number % 60], str(number), *words[number % 60 :]])) for number in range(600)
    ]
    compared: list[int] = []
    usual = duplicates.jaccard
    monkeypatch.setattr(duplicates, "jaccard", lambda one, other: compared.append(1) or usual(one, other))
    found = duplicates.find_copies([stored(merged, [chat("Other", "Words"), *rows])])["train"]
    assert len(compared) <= 12 * 600
    assert found.rows == 601
    assert found.counts["near-duplicate"] == 495  # as comparing all pairs finds


def test_of_very_many_rows_some_are_searched_and_that_is_said(
    merged: Any, real_rows: list[Any], monkeypatch: pytest.MonkeyPatch, write_rows: Any
) -> None:
    monkeypatch.setattr(duplicates, "MOST_SEARCHED", 100)
    made = prepare(Data(train=write_rows(real_rows)), tokenizer=merged, seed=0, cache=None)
    copies = made.copies["train"]
    assert copies.searched == 100 + copies.counts["duplicate"]
    near = [line for line in made.warnings if "(near-duplicate)" in line]
    assert all(f"searched for in {copies.searched} of the rows" in line for line in near)


def test_copies_are_found_once(merged: Any, real_rows: list[Any], write_rows: Any, tmp_path: Path) -> None:
    data = Data(train=write_rows(real_rows, "train.jsonl"), eval=write_rows(real_rows[:9], "eval.jsonl"))
    settings: dict[str, Any] = {"tokenizer": merged, "seed": 0, "cache": tmp_path / "cache"}
    first = prepare(data, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "find_copies", lambda *_: pytest.fail("searched again"))
        again = prepare(data, **settings)
        assert [dataclasses.astuple(each) for each in overview.set_findings(again.seen, again.copies, "eval", [])] == [
            dataclasses.astuple(each) for each in overview.set_findings(first.seen, first.copies, "eval", [])
        ]
        prepare(data.model_copy(update={"audit_ignore": [finding.kind for finding in SET_FINDINGS]}), **settings)
    assert again.warnings == first.warnings
    (told,) = (line for line in first.warnings if "(train-in-eval)" in line)
    assert f"9 of 9 rows are rows of training too, or nearly (train-in-eval); the first is {data.eval}:1" in told


def test_both_answers_of_a_preference_row_are_compared(make_tokenizer: Any, write_rows: Any) -> None:
    row = {"prompt": "the cat ", "chosen": "sat on the mat", "rejected": "what is the capital?"}
    kind = frozenset({"preference"})
    rows = [row, {**row, "rejected": "0123456789 and so on, for ever"}, row]
    made = prepare(Data(train=write_rows(rows)), tokenizer=make_tokenizer(), seed=0, cache=None, learns=kind)
    assert made.copies["train"].pairs["duplicate"] == [(2, 0)]


def test_streamed_rows_are_looked_at_before_the_run(tokenizer: Any, write_rows: Any) -> None:
    rows = [chat(f"what is {number}?", "it is") for number in range(LOOKED_AT + 5)]
    data = Data(train=write_rows([*rows, rows[0]]), streaming=True)
    made = prepare(data, tokenizer=tokenizer, seed=0, cache=None)
    assert [each.audit.rows for each in made.first_rows] == [LOOKED_AT]
    assert "train" not in made.stored


def test_lengths_and_padding_are_those_of_the_batches() -> None:
    lengths = numpy.random.default_rng(0).integers(5, 100, 1000)
    about = length_summary(lengths)
    ordered = sorted(lengths.tolist())
    assert [about["p50"], about["p95"], about["p99"]] == [ordered[499], ordered[949], ordered[989]]
    assert sum(about["counts"]) == 1000
    assert about["counts"][0] == sum(about["edges"][0] <= each < about["edges"][1] for each in ordered)
    assert about["edges"][0] == ordered[0] < ordered[-1] < about["edges"][-1]
    recipe = Data(train="a", max_length=256), Training(output_dir="o", per_device_train_batch_size=4)
    found = padding(lengths, *recipe, packs=True)
    assert found["now"] == found["random"]
    assert 0.3 < found["random"] < 0.5  # of four even draws the largest is 0.8, the mean 0.5 of the longest
    assert found["max_tokens_per_batch"] <= found["group_by_length"] + 0.02 < found["random"] / 5
    assert found["packing"] < 0.02
    chosen = padding(lengths, Data(train="a", max_length=256, packing=True), recipe[1], packs=True)
    assert chosen["now"] == found["packing"]
    assert "packing" not in padding(lengths, *recipe, packs=False)


def test_a_long_text_ends_in_no_piece_of_a_single_token(make_tokenizer: Callable[..., Any], write_rows: Any) -> None:
    tokenizer = make_tokenizer(None)
    count = len(tokenizer("the cat sat on the mat", add_special_tokens=False)["input_ids"]) + 1
    data = Data(train=write_rows([{"text": "the cat sat on the mat"}]), max_length=count - 1)
    made = prepare(data, tokenizer=tokenizer, seed=0, cache=None, learns=frozenset({"text"}))
    audit = made.stored["train"][0].audit
    assert (audit.rows, audit.left_out, audit.tokens, audit.counts) == (2, 0, count, {})
