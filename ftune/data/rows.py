"""Rows from files, each with the file and the number under which its owner finds it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune.data.faults import Faults, fault
from ftune.data.readers import READERS, Reader
from ftune.errors import DataError
from ftune.places import meant_as_data_file

_BOOKKEEPING = frozenset({"dataset_info.json", "dataset_dict.json", "state.json"})
"""What `save_to_disk` writes beside the rows."""


@dataclass(frozen=True)
class Row:
    """One row: where it stands and what it says."""

    file: str
    number: int
    """From 1; the line in text files."""
    values: dict[str, Any]


def read_rows(source: str, split: str = "train", faults: Faults | None = None) -> Iterator[Row]:
    """Yield the rows of a file, of a directory's files in sorted order, or of a hub data set's split.

    Nothing is held beyond the current row (batch, for columnar files), except for `.json`, which is one value. Bad rows
    are gathered in `faults`, to be raised by its owner; without one, the first is raised.
    """
    if not is_local(source):
        from ftune.data.hub import hub_rows

        for number, values in enumerate(hub_rows(source, split), start=1):
            yield Row(f"{source}/{split}", number, values)
        return
    gathered = Faults(most=1) if faults is None else faults
    for path in files_of(source):
        found, before = False, len(gathered)
        for number, values in _reader(path)(path, gathered):
            found = True
            yield Row(str(path), number, values)
        if not found and len(gathered) == before:
            gathered.add(fault("the file holds no rows", str(path), fix="fill it, or take it out of `data`"))


def is_local(source: str) -> bool:
    """Return whether a source names a path; DataError for a path where nothing is."""
    path = Path(source).expanduser()
    if path.exists():
        return True
    if not meant_as_data_file(source):
        return False
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
        fix = f"did you mean {path.parent / near[0]}?" if near else f"look into {path.parent}"
    else:
        fix = f"there is no directory {path.parent} either"
    raise DataError(fault(f"there is no file {source}", source, fix=fix))


def files_of(source: str) -> list[Path]:
    """Return a local source's files; every one has an ending that can be read."""
    path = Path(source).expanduser()
    if not path.is_dir():
        _reader(path)
        return [path]
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith(("_", ".")))
    files = [entry for entry in entries if entry.is_file() and entry.name not in _BOOKKEEPING]
    if not files:
        inside = [entry.name for entry in entries if entry.is_dir()]
        fix = f"name one of its directories: {', '.join(inside)}" if inside else "put data files into it"
        raise DataError(fault(f"the directory {source} holds no data files", source, fix=fix))
    for file in files:
        _reader(file)
    return files


def _reader(path: Path) -> Reader:
    endings = [ending.lower() for ending in path.suffixes]
    ending = endings[-1] if endings else ""
    if ending == ".gz" and len(endings) > 1 and endings[-2] in READERS and endings[-2] not in (".parquet", ".arrow"):
        ending = endings[-2]
    if ending not in READERS:
        known = ", ".join(READERS)
        fix = f"known are {known} (text ones also with .gz); rename it, or list the files to read in `data`"
        raise DataError(fault(f"cannot tell from its name how to read {path.name}", str(path), fix=fix))
    return READERS[ending]
