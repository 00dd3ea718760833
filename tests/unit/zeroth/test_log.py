"""The log's file: written, cut, torn, lost."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from ftune.errors import RunError
from ftune.zeroth import log

HEADER = log.Header("stochastic", ("a", "b"), (0.1, 0.0))
ENTRIES = [log.Entry(seed, log.float32(0.1 * seed), log.float32(1e-6)) for seed in range(5)]


def written(directory: Path, start: int = 0, header: log.Header = HEADER) -> Path:
    writer = log.Writer(directory, header)
    for step, entry in enumerate(ENTRIES[start:], start=start):
        writer.append(step, entry, [None, None])
    return directory / log.NAME


def test_bytes_are_those_the_format_says(tmp_path: Path) -> None:
    line, _, packed = written(tmp_path).read_bytes().partition(b"\n")
    assert json.loads(line)["names"] == ["a", "b"]
    assert packed == b"".join(struct.pack("<Iff", entry.seed, entry.gradient, entry.rate) for entry in ENTRIES)
    assert log.read(tmp_path) == (HEADER, tuple(ENTRIES))


@pytest.mark.parametrize("torn", [b"", b"1234567"])
def test_going_on_cuts_what_comes_after(torn: bytes, tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert log.read(tmp_path)[1] == tuple(ENTRIES)
    written(tmp_path, start=3)
    assert path.read_bytes() == whole


def test_a_log_too_short_or_of_another_run_is_begun_anew(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    written(tmp_path, start=3)
    header, entries = log.read(tmp_path)
    assert (header.first_step, entries) == (3, tuple(ENTRIES[3:]))
    other = log.Header("nearest", ("a",), (0.0,))
    written(tmp_path, start=4, header=other)
    assert log.read(tmp_path)[0].first_step == 4
    written(tmp_path, start=0)
    assert log.read(tmp_path) == (HEADER, tuple(ENTRIES))


def test_one_begun_late_is_cut_at_its_own_places(tmp_path: Path) -> None:
    written(tmp_path, start=2)
    written(tmp_path, start=4)
    header, entries = log.read(tmp_path)
    assert (header.first_step, entries) == (2, tuple(ENTRIES[2:]))


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[1]\n", b"\xff\x00", b'{"names": 3}\n'])
def test_what_is_no_log_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / log.NAME).write_bytes(content)
    with pytest.raises(RunError, match="cannot be read"):
        log.read(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 1'))
    with pytest.raises(RunError, match="version 1"):
        log.read(tmp_path)
