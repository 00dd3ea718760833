"""Every kind of file gives the same rows, and what is wrong is found by file and row."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from ftune.data.faults import Faults
from ftune.data.readers import READERS
from ftune.data.rows import read_rows
from ftune.errors import DataError, Problem
from ftune.places import DATA_ENDINGS

ROWS = [{"text": 'one, "two"'}, {"text": "zwei\nLinien"}, {"text": "trois é\u2028"}]


def write_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2))


def write_object(path: Path) -> None:
    path.write_text(json.dumps({"version": "1", "data": ROWS}))


def write_csv(path: Path, separator: str = ",") -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter=separator)
        writer.writerows([["text"], *[[row["text"]] for row in ROWS]])


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)


def write_stream(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)


def write_feather(path: Path) -> None:
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(ROWS), str(path), compression="uncompressed")


@pytest.mark.parametrize(
    ("name", "write", "numbers"),
    [
        ("a.jsonl", write_jsonl, [1, 2, 3]),
        ("a.ndjson", write_jsonl, [1, 2, 3]),
        ("a.json", write_json, [1, 2, 3]),
        ("lines.json", write_jsonl, [1, 2, 3]),
        ("object.json", write_object, [1, 2, 3]),
        ("a.csv", write_csv, [2, 3, 5]),
        ("a.tsv", lambda path: write_csv(path, "\t"), [2, 3, 5]),
        ("a.parquet", write_parquet, [1, 2, 3]),
        ("a.arrow", write_stream, [1, 2, 3]),
        ("b.arrow", write_feather, [1, 2, 3]),
    ],
)
def test_every_kind_of_file(name: str, write: Callable[[Path], None], numbers: list[int], tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    read = list(read_rows(str(path)))
    assert [row.values for row in read] == ROWS
    assert [row.number for row in read] == numbers
    assert {row.file for row in read} == {str(path)}
    if path.suffix not in (".parquet", ".arrow"):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert [(row.number, row.values) for row in read_rows(str(packed))] == [
            (row.number, row.values) for row in read
        ]


def test_text_and_bare_lines_count_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n  \nfour\n")
    assert [(row.number, row.values) for row in read_rows(str(tmp_path / "a.txt"))] == [
        (1, {"text": "one"}),
        (4, {"text": "four"}),
    ]
    (tmp_path / "a.jsonl").write_text('"one"\n\n"three"\n')
    assert [(row.number, row.values["text"]) for row in read_rows(str(tmp_path / "a.jsonl"))] == [
        (1, "one"),
        (3, "three"),
    ]


def test_a_directory_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "state.json").write_text('{"files": ["x"]}')
    assert [row.values["text"] for row in read_rows(str(tmp_path))] == ["first", "second"]


def problem_of(source: Path | str, **more: Any) -> Problem:
    with pytest.raises(DataError) as caught:
        list(read_rows(str(source), **more))
    return caught.value.problems[0]


def test_bad_json_names_file_line_and_column(tmp_path: Path) -> None:
    lines = ['{"text": "good"}'] * 2000
    lines[1233] = "{\"text\": 'bad'}" + " " * 500
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    rows = read_rows(str(path))
    assert sum(1 for _ in zip(range(1233), rows)) == 1233  # noqa: B905
    with pytest.raises(DataError) as caught:
        next(rows)
    (problem,) = caught.value.problems
    assert problem.where is not None
    assert str(problem.where) == f"{path}:1234:10"
    assert problem.where.text.startswith("{\"text\": 'bad'}")
    assert len(problem.where.text) <= 200
    assert "double quotes" in problem.fix


@pytest.mark.parametrize(
    ("name", "content", "what", "fix", "line"),
    [
        ("a.jsonl", b'{"text": "x', "not valid JSON", "mend|cut off", 1),
        ("a.jsonl", b'{"a": 1}\n{"text":', "not valid JSON", "cut off", 2),
        ("a.jsonl", b'[\n{"a": 1}\n]', "not valid JSON", r"rename the file to \.json", 1),
        ("a.jsonl", b"[1, 2]\n", "not an object but", r"ending in \.json", 1),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "byte 8 of the line .0xff. is not valid UTF-8", "iconv", 2),
        ("a.txt", b"good\n\xe9\n", "not valid UTF-8", "iconv", 2),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "has 3 fields, the header has 2", "quotes", 3),
        ("a.csv", b"a,a\n1,2\n", "column name is there twice", "rename", 1),
        ("a.csv", b'a,b\n"open,2\n', "cannot read the table", "mend", 2),
        ("a.json", b'[{"a": 1},\n{"b" 2}]', "not valid JSON", "mend", 2),
        ("a.json", b'{"a": [1], "b": [2]}', "object with 2 lists", "one list", None),
        ("a.json", b"3", "not a list of rows", "write", None),
        ("a.jsonl", b"\n\n", "holds no rows", "fill it", None),
        ("a.csv", b"a,b\n", "holds no rows", "fill it", None),
        ("a.parquet", b"not parquet at all", "cannot read a.parquet", "again", None),
        ("a.arrow", b"not arrow at all", "cannot read a.arrow", "again", None),
        ("a.jsonl.gz", b"not packed", "cannot unpack", "again", None),
        ("a.docx", b"", "cannot tell from its name how to read a.docx", "known are .jsonl", None),
    ],
)
def test_what_is_wrong_with_a_file(
    name: str, content: bytes, what: str, fix: str, line: int | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    problem = problem_of(path)
    assert re.search(what, problem.what)
    assert re.search(fix, problem.fix)
    assert problem.where is not None
    assert (problem.where.file, problem.where.line) == (str(path), line)


def test_a_file_cut_off_while_packed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n' * 50)[:-12])
    assert "cannot unpack" in problem_of(path).what


def test_a_bad_place_far_into_a_line_is_shown_by_what_is_near(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * 5000 + '" "y": 1}')
    problem = problem_of(path)
    assert problem.where is not None
    assert problem.where.text == ""
    assert '"y": 1' in problem.what


def test_missing_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    assert "did you mean" in problem_of(tmp_path / "trian.jsonl").fix
    assert "no directory" in problem_of(tmp_path / "nowhere" / "train.jsonl").fix
    assert "no file data/train.jsonl" in problem_of("data/train.jsonl").what
    inside = tmp_path / "set"
    (inside / "train").mkdir(parents=True)
    assert "train" in problem_of(inside).fix


def test_bad_rows_are_gathered(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{}", "bad", "{}", "worse"]))
    faults = Faults()
    assert [row.number for row in read_rows(str(path), faults=faults)] == [1, 3]
    with pytest.raises(DataError) as caught:
        faults.stop()
    assert [problem.where.line for problem in caught.value.problems if problem.where] == [2, 4]
    path.write_text("bad\n" * 100)
    with pytest.raises(DataError) as caught:
        list(read_rows(str(path), faults=Faults()))
    assert len(caught.value.problems) == 10


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), "offline"),
        (ValueError("Bad split: train. Available splits: ['test']"), "set data.train_split .*test, validation"),
        (ValueError("Config name is missing."), "several configurations"),
        (RuntimeError("gated repo"), "hf auth login"),
    ],
)
def test_what_is_wrong_with_a_hub_data_set(error: Exception, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["test", "validation"])
    problem = problem_of("somebody/something")
    assert "hub data set somebody/something" in problem.what
    assert re.search(fix, problem.fix)


def test_hub_rows_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def load(name: str, **more: Any) -> Any:
        asked.update(more, name=name)
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows("somebody/something", "test"))
    assert asked == {"name": "somebody/something", "split": "test", "streaming": True}
    assert [(row.file, row.number) for row in rows] == [("somebody/something/test", 1), ("somebody/something/test", 2)]


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"text": ' + "9" * 5000 + "}]"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_json_that_python_cannot_hold(text: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_text(text)
    with pytest.raises(DataError, match=r"nested too deeply|limit"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_utf_16_is_named(encoding: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_text('{"text": "one"}\n{"text": "two"}\n', encoding=encoding)
    with pytest.raises(DataError, match="-f UTF-16"):
        list(read_rows(str(path)))


def test_what_check_takes_for_a_data_file_is_what_can_be_read() -> None:
    assert set(DATA_ENDINGS) == set(READERS)
