"""Several sources, shares, streams and the cache: which rows come from where, none mistaken for another."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from prepared_rows import EXPECTED, ROWS, answers, dialogue, plain, prepared

from ftune.data import tokens
from ftune.data.cache import source_fingerprint, tokenizer_fingerprint, writable
from ftune.data.mixing import mix
from ftune.data.parts import Part
from ftune.data.prepare import names_of
from ftune.data.sequences import sequences
from ftune.data.tokens import Kept, TokenRow
from ftune.errors import DataError


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 7),
        ({"mixing_temperature": 2}, 7),
        ({"eval": 0.5}, 7),
        ({"eval": 0.5, "mixing_temperature": 2}, 7),
        ({"max_eval_samples": 100}, 60),
        ({"max_eval_samples": 100, "mixing_temperature": 2}, 60),
    ],
    ids=str,
)
def test_no_more_rows_are_evaluated_than_asked_for(
    settings: dict[str, Any], expected: int, tokenizer: Any, write_rows: Any
) -> None:
    both = [write_rows(ROWS[:50], "a.jsonl"), write_rows(ROWS[50:], "b.jsonl")]
    made = prepared(tokenizer, **{"train": both, "eval": both, "max_eval_samples": 7, **settings})
    found = answers(tokenizer, made.eval)
    assert len(found) == expected
    assert found == sorted(found, key=EXPECTED.index), "the first ones"


def test_a_text_that_becomes_many_rows_counts_as_many(make_tokenizer: Any, write_rows: Any) -> None:
    path = write_rows([{"text": f"{number} the cat sat on the mat" * 20} for number in range(5)])
    wanted = {"train": path, "eval": path, "max_length": 16, "max_train_samples": 3, "max_eval_samples": 4}
    made = prepared(make_tokenizer(None), whole=True, **wanted)
    assert (len(made.train), len(made.eval)) == (3, 4)


def test_rows_that_teach_nothing_are_among_the_first_so_many(tokenizer: Any, write_rows: Any) -> None:
    sources = [
        write_rows([dialogue("q", ""), *ROWS[:4]], "a.jsonl"),
        write_rows(ROWS[4:8], "b.jsonl"),
        write_rows([{"mesages": []}], "c.jsonl"),
    ]
    wanted = {"train": sources, "format": "messages"}
    assert answers(tokenizer, prepared(tokenizer, **wanted, max_train_samples=7).train) == EXPECTED[:6]
    made = prepared(tokenizer, **wanted, max_train_samples=5)
    assert answers(tokenizer, made.train) == EXPECTED[:4]
    assert (made.names, made.train.names) == (("a", "b", "c"), ("a",))


@pytest.mark.parametrize("most", [10, 40, None])
def test_a_temperature_counts_the_rows_of_a_source_and_not_those_taken(
    most: int | None, tokenizer: Any, write_rows: Any
) -> None:
    sources = [write_rows(ROWS[:48], "a.jsonl"), write_rows(ROWS[48:], "b.jsonl")]
    made = prepared(tokenizer, train=sources, mixing_temperature=1, max_train_samples=most).train
    assert len(made) == (most or 60)
    assert sum(row["source"] for row in made) == len(made) // 5


def test_the_recipe_says_how_a_mix_ends_and_its_seed_what_is_in_it(tokenizer: Any, write_rows: Any) -> None:
    sources = [
        {"path": write_rows(ROWS[:50], "a.jsonl"), "weight": 1},
        {"path": write_rows(ROWS[50:], "b.jsonl"), "weight": 1},
    ]
    long = prepared(tokenizer, train=sources).train
    short, again, other = (
        prepared(tokenizer, train=sources, mixing_stop="first_exhausted", seed=seed).train for seed in (1, 1, 2)
    )
    assert (len(long), len(short)) == (100, 20)
    assert answers(tokenizer, short) == answers(tokenizer, again) != answers(tokenizer, other)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_share_leaves_a_row_on_either_side(share: float, count: int, tokenizer: Any, write_rows: Any) -> None:
    made = prepared(tokenizer, train=write_rows(ROWS[:count]), eval=share)
    assert len(made.eval) == min(count - 1, max(1, round(count * share)))
    assert sorted(answers(tokenizer, made.train) + answers(tokenizer, made.eval)) == sorted(EXPECTED[:count])


def test_every_source_holds_out_its_share(tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    sources = [write_rows(ROWS[:40], "a.jsonl"), write_rows(ROWS[40:], "b.jsonl")]
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        made = prepared(tokenizer, cache, train=sources, eval=0.1)
        assert [row["source"] for row in made.eval] == [0] * 4 + [1] * 2
        assert sorted(answers(tokenizer, made.train) + answers(tokenizer, made.eval)) == sorted(EXPECTED)


TURNS = [
    {"messages": [turn for row in (ROWS[number], ROWS[number + 1]) for turn in row["messages"]]} for number in range(20)
]


@pytest.mark.parametrize("change", [{"train_on_turns": "last"}, {"assistant_only_loss": False}], ids=str)
def test_the_cache_knows_what_is_learned_of_a_conversation(
    change: dict[str, Any], tokenizer: Any, write_rows: Any, tmp_path: Path
) -> None:
    path = write_rows(TURNS)
    before = prepared(tokenizer, tmp_path / "cache", train=path)
    found, fresh = (prepared(tokenizer, cache, train=path, **change) for cache in (tmp_path / "cache", None))
    assert plain(found) == plain(fresh) != plain(before)


def test_the_cache_knows_the_format_and_the_ending(make_tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(None)
    rows = [{"prompt": "the cat", "completion": " sat", "text": "on the mat"}]
    for name, settings, expected in [
        ("rows.jsonl", {"format": "prompt_completion"}, " sat</s>"),
        ("rows.jsonl", {"format": "text"}, "n the mat</s>"),
        ("rows.txt", {"format": "text"}, json.dumps(rows[0])[1:] + "</s>"),
    ]:
        made = prepared(tokenizer, tmp_path / "cache", train=write_rows(rows, name), **settings)
        (found,) = answers(tokenizer, made.train)
        assert found.endswith(expected)


def test_the_cache_knows_every_file_of_a_folder(tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write_rows(ROWS[:2], "rows/a.jsonl")
    for expected in (EXPECTED[2:4], EXPECTED[4:6], EXPECTED[6:9]):
        write_rows([ROWS[EXPECTED.index(answer)] for answer in expected], "rows/b.jsonl")
        made = prepared(tokenizer, tmp_path / "cache", train=str(tmp_path / "rows"))
        assert answers(tokenizer, made.train) == EXPECTED[:2] + expected
        places = [made.stored["train"][0].origin(row) for row in range(len(made.train))]
        lines = [("a", 1), ("a", 2), *(("b", line) for line in range(1, len(expected) + 1))]
        assert places == [(str(tmp_path / f"rows/{name}.jsonl"), line) for name, line in lines]


def test_the_cache_does_not_care_what_a_tokenizer_was_used_for(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["the cat", "the cat sat on the mat"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer.backend_tokenizer.padding is not None
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(make_tokenizer())


def test_rows_are_named_by_where_their_file_is_now(tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    rows = [*ROWS[:2], dialogue("q", "")]
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    write_rows(rows, "first/a.jsonl")
    write_rows([*ROWS[3:5], dialogue("p", "")], "first/b.jsonl")
    for folder, names in ((first, ("a", "b")), (second, ("x", "y"))):
        made = prepared(tokenizer, tmp_path / "cache", train=str(folder))
        examples = made.stored["train"][0].audit.examples["empty-answer"]
        assert [str(example) for example in examples] == [f"{folder / name}.jsonl:3" for name in names]
        assert f"the first is {folder / names[0]}.jsonl:3" in made.warnings[0]
        if folder == first:
            second.mkdir()
            (first / "a.jsonl").rename(second / "x.jsonl")
            (first / "b.jsonl").rename(second / "y.jsonl")
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


def test_rows_whose_contents_nobody_can_tell_are_never_taken_from_the_cache(
    tokenizer: Any, write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftune.data.cache.source_fingerprint", lambda source, split: None)
    cache = tmp_path / "cache"
    for rows in (ROWS[:4], ROWS[4:8]):
        made = prepared(tokenizer, cache, train=write_rows(rows), eval=0.25)
        assert sorted(answers(tokenizer, made.train) + answers(tokenizer, made.eval)) == sorted(
            row["messages"][1]["content"] + "<|im_end|>" for row in rows
        )
        assert all(each.key == "" for every in made.stored.values() for each in every)
    # Notes say that rows may be used again; and several ranks would write them at once.
    assert {path.suffix for path in cache.iterdir()} == {".arrow"}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["a/rows.jsonl"], ["rows"]),
        (["a/x.jsonl", "b/y.jsonl"], ["x", "y"]),
        (["a/rows.jsonl", "b/rows.jsonl"], ["a/rows", "b/rows"]),
        (["a/c/rows.jsonl", "b/c/rows.jsonl", "x.csv"], ["a/c/rows", "b/c/rows", "x"]),
        (["rows.jsonl", "rows.csv"], ["rows.jsonl", "rows.csv"]),
        (["a/b/c/d.jsonl", "x/b/c/d.jsonl"], ["a/b/c/d.jsonl", "x/b/c/d.jsonl"]),
        (["x.jsonl", "y.jsonl", "x.jsonl"], ["x.jsonl (1)", "y.jsonl", "x.jsonl (3)"]),
    ],
    ids=str,
)
def test_sources_are_called_what_tells_them_apart(sources: list[str], expected: list[str]) -> None:
    assert names_of([Part("train", source, "train") for source in sources]) == expected


@pytest.mark.parametrize("source", [".", "..", "./", "../rows"])
def test_the_folder_that_one_is_in_has_a_name(
    source: str, tokenizer: Any, write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rows"
    (folder / "_inside").mkdir(parents=True)
    write_rows(ROWS[:3], "rows/a.jsonl")
    monkeypatch.chdir(folder / "_inside" if source == ".." else folder)
    made = prepared(tokenizer, train=source)
    assert (answers(tokenizer, made.train), made.names) == (EXPECTED[:3], ("rows",))


def test_a_packed_sequence_says_whose_each_token_is(tokenizer: Any, write_rows: Any) -> None:
    sources = [write_rows(ROWS[:6], "a.jsonl"), write_rows(ROWS[6:30], "b.jsonl")]
    wanted = {"train": sources, "eval": sources}
    alone = prepared(tokenizer, **wanted).train
    whose = {tuple(row["input_ids"]): row["source"] for row in alone}
    made = prepared(tokenizer, **wanted, packing=True, max_length=128)
    for rows in (made.train, made.eval):
        assert rows.lengths.tolist() == [len(row["input_ids"]) for row in rows]
        assert rows.num_tokens == alone.num_tokens == sum(len(row["input_ids"]) for row in alone)
        for row in rows:
            starts = numpy.flatnonzero(row["position_ids"] == 0).tolist()
            for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
                expected = whose[tuple(row["input_ids"][start:end])]
                assert row["source"][start:end].tolist() == [expected] * (end - start)


def test_the_lengths_are_those_of_the_rows_and_there_is_no_row_beyond(tokenizer: Any, write_rows: Any) -> None:
    sources = [
        {"path": write_rows(ROWS[:9], "a.jsonl"), "weight": 1},
        {"path": write_rows([*ROWS[9:20], dialogue("[INST]", "<end_of_turn>")], "b.jsonl"), "weight": 2},
    ]
    rows = prepared(tokenizer, train=sources).train
    assert rows.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert rows.largest_id() == max(int(row["input_ids"].max()) for row in rows)
    for at in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[at]


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_says_which_source_a_row_is_of(
    packing: bool, tokenizer: Any, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftune.data.stream._PACK", 50)
    texts = [ROWS[:20], [*ROWS[20:40], {"messages": [{"role": "user", "content": "nobody answers"}]}]]
    for weights in ((None, None), (3, 1)):
        sources = [
            {"path": write_rows(rows, f"{name}.jsonl"), "weight": weight}
            for name, rows, weight in zip("ab", texts, weights, strict=True)
        ]
        made, again = (
            prepared(tokenizer, train=sources, streaming=True, shuffle_buffer_size=3, packing=packing, max_length=128)
            for _ in range(2)
        )
        rows = list(itertools.islice(made.train, 60))
        assert rows == list(itertools.islice(again.train, 60))
        found: set[tuple[int, str]] = set()
        for row in rows:
            whose = row["source"] if packing else [row["source"]] * len(row["input_ids"])
            assert any(label != -100 for label in row["labels"])
            for answer in tokenizer.decode([each for each in row["labels"] if each != -100]).split("<|im_end|>")[:-1]:
                learned = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
                at = next(at for at in range(len(whose)) if row["labels"][at : at + len(learned)] == learned)
                found.add((whose[at], answer + "<|im_end|>"))
        for source, answer in found:
            assert EXPECTED.index(answer) // 20 == source
        assert {source for source, _ in found} == {0, 1}


def test_the_seed_decides_what_a_stream_draws(tokenizer: Any, write_rows: Any) -> None:
    sources = [
        {"path": write_rows(ROWS[:30], "a.jsonl"), "weight": 1},
        {"path": write_rows(ROWS[30:], "b.jsonl"), "weight": 1},
    ]
    # A buffer of one shuffles nothing: what differs is which source is drawn from.
    drawn = [
        [row["source"] for row in itertools.islice(made.train, 50)]
        for made in (
            prepared(tokenizer, train=sources, streaming=True, shuffle_buffer_size=1, seed=seed) for seed in (1, 1, 2)
        )
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    orders = [
        answers(tokenizer, itertools.islice(made.train, 50))
        for made in (
            prepared(tokenizer, train=sources[0]["path"], streaming=True, shuffle_buffer_size=20, seed=seed)
            for seed in (1, 1, 2)
        )
    ]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_several_processes_do_what_one_does(
    tokenizer: Any, write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftune.data.workers.BATCH", 3)
    monkeypatch.setattr("ftune.data.workers._ALONE", 2)
    (tmp_path / "rows").mkdir()
    for name, rows in (("a", ROWS[:30]), ("b", [*ROWS[30:], dialogue("q", ""), dialogue("cat " * 90, "no")])):
        write_rows(rows, f"rows/{name}.jsonl")
    wanted = {"train": str(tmp_path / "rows"), "max_length": 80}
    for before in (None, "true"):
        if before is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        one, several = (prepared(tokenizer, **wanted, num_proc=count) for count in (1, 2))
        assert plain(several) == plain(one)
        (stored,), (expected,) = several.stored["train"], one.stored["train"]
        assert stored.audit == expected.audit
        assert [stored.origin(row) for row in range(60)] == [expected.origin(row) for row in range(60)]
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before
    write_rows([*ROWS[:20], {"mesages": []}, *ROWS[:20], {"mesages": []}], "rows/c.jsonl")
    for count in (1, 2):
        with pytest.raises(DataError) as caught:
            prepared(tokenizer, **wanted, num_proc=count)
        places = [str(problem.where) for problem in caught.value.problems]
        assert places == [f"{tmp_path}/rows/c.jsonl:{line}" for line in (21, 42)]


def test_a_folder_that_cannot_be_written_to_is_no_cache(tmp_path: Path) -> None:
    assert writable(None) is None
    assert writable(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    (tmp_path / "file").write_text("")
    assert writable(tmp_path / "file") is None
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.geteuid() != 0:  # the system's own account may write everywhere
        assert writable(closed) is None


def test_a_hub_data_set_is_known_by_its_commit_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["first", "first", "second", None])
    monkeypatch.setattr("ftune.data.hub.revision", lambda name: next(commits))
    found = [source_fingerprint("some/rows", split) for split in ("train", "test", "train", "train")]
    assert len(set(found)) == 4
    assert found[-1] is None, "where the commit is unknown nothing may be taken from the cache"


def test_numbers_are_those_of_all_sources_however_many_tokens_they_have() -> None:
    texts = [TokenRow(numpy.array([number]), numpy.array([[0, 1]])) for number in (3, 9, 5)]
    files = [tokens.write(None, "", ("",), numpy.uint16, [Kept(0, 1, (text,))]) for text in texts]
    rows = sequences(files, "abc", mix([1, 1, 1], None, stop="all_exhausted", seed=0), ("",), capacity=None)
    assert rows.largest_id() == 9
    assert rows.num_tokens == 3
    # Three rows of two milliards are more than 32 bits count.
    assert replace(rows, lengths=numpy.full(3, 2**31 - 1, dtype=numpy.int32)).num_tokens == 3 * (2**31 - 1)


def test_a_stream_is_packed_as_full_as_rows_on_the_disk(tokenizer: Any, write_rows: Any) -> None:
    wanted = {"train": write_rows(ROWS), "packing": True, "max_length": 128}
    stored = prepared(tokenizer, **wanted).train
    streamed = prepared(tokenizer, **wanted, streaming=True, shuffle_buffer_size=1).train
    sizes = [len(row["input_ids"]) for row in itertools.islice(streamed, 50)]
    assert sum(sizes) / len(sizes) >= stored.num_tokens / len(stored)
