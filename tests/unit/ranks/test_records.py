"""Which of several failures came first, and that nothing of an error is lost on its way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ftune.errors import DataError, Interrupted, Place, Problem, RunError
from ftune.ranks import records
from ftune.ranks.records import Record, first_cause

PROBLEM = Problem(
    "unreadable-row",
    "row 7 is no row",
    Place("rows.jsonl", 7, 1, "{", 1),
    "here",
    "why",
    "fix",
    ((Place("a", 1), "b"),),
)


def record(kind: records.Kind, at: float, *, attempt: int = 0, exit_code: int = 5) -> Record:
    return Record(kind, exit_code, (PROBLEM,), 0, attempt, "host", at)


def test_an_error_comes_back_as_it_was(tmp_path: Path) -> None:
    written = records.record_of(DataError(PROBLEM, PROBLEM))
    records.write(written, [tmp_path])
    (found,) = records.read([tmp_path])
    assert found == written
    assert isinstance(found.error(), DataError)
    assert found.error().problems == (PROBLEM, PROBLEM)


def test_the_first_one_by_time_is_the_cause() -> None:
    assert first_cause([record("problem", 2.0, exit_code=4), record("problem", 1.0, exit_code=3)]).exit_code == 3


def test_a_rank_that_lost_the_others_is_never_the_cause_of_what_came_later() -> None:
    """The peers of a killed rank notice at once, and the agent only when it looks."""
    assert first_cause([record("lost-peer", 1.0), record("killed", 2.0)]).kind == "killed"
    assert first_cause([record("lost-peer", 2.0), record("lost-peer", 1.0)]).time == 1.0


def test_what_an_earlier_attempt_failed_of_is_over() -> None:
    assert first_cause([record("killed", 1.0), record("problem", 9.0, attempt=1)]).kind == "problem"
    assert first_cause([]) is None


def test_records_of_an_earlier_launch_do_not_count(tmp_path: Path) -> None:
    records.write(record("killed", 1.0), [tmp_path])
    before = records.names([tmp_path])
    assert records.read([tmp_path], but=before) == []
    records.write(record("hung", 2.0), [tmp_path])
    assert [found.kind for found in records.read([tmp_path], but=before)] == ["hung"]


def test_a_folder_that_takes_nothing_does_not_hide_the_cause(tmp_path: Path) -> None:
    closed = tmp_path / "file"
    closed.touch()
    records.write(record("killed", 1.0), [closed / "records", tmp_path / "open"])
    assert len(records.read([closed / "records", tmp_path / "open"])) == 1


def test_one_record_in_two_folders_is_one(tmp_path: Path) -> None:
    records.write(record("killed", 1.0), [tmp_path / "a", tmp_path / "b"])
    assert len(records.read([tmp_path / "a", tmp_path / "b"])) == 1


def test_half_a_record_is_none(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text('{"kind": "kil')
    assert records.read([tmp_path]) == []


@pytest.mark.parametrize(("code", "kind"), [(4, DataError), (5, RunError), (99, RunError)])
def test_the_exit_code_is_that_of_the_error(code: int, kind: type) -> None:
    assert type(replace(record("problem", 1.0), exit_code=code).error()) is kind


def test_a_stop_that_was_saved_is_told_from_one_at_once() -> None:
    error = Interrupted(PROBLEM)
    assert records.record_of(error).kind == "saved"
    error.__cause__ = KeyboardInterrupt()
    assert records.record_of(error).kind == "interrupted"
    assert records.record_of(error).exit_code == 130


def test_a_rank_that_was_ended_is_not_the_cause_of_another_ones_end() -> None:
    assert first_cause([record("interrupted", 1.0), record("killed", 2.0)]).kind == "killed"
    assert first_cause([record("lost-peer", 1.0), record("interrupted", 2.0)]).kind == "interrupted"
