"""What is odd about whole sets: copies of rows, and rows of evaluation that are learned too; found once, then kept."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from ftune import rundir
from ftune.data import cache as store
from ftune.data import duplicates
from ftune.data.audit import MOST_EXAMPLES, Example, Found, shortened
from ftune.data.duplicates import Copies
from ftune.findings import SET_FINDINGS

if TYPE_CHECKING:
    from ftune.data.prepare import Stored

_WORDS = 60

Parts = Mapping[str, Sequence["Stored"]]
"""The stored sources of `train` and of `eval`."""


def copies_of(parts: Parts, cache: Path | None, ignored: Sequence[str]) -> dict[str, Copies]:
    """Return the copies among the rows of each part; nothing is searched for that nobody wants to know."""
    if all(finding.kind in ignored for finding in SET_FINDINGS):
        return {}
    train, evaluation = (list(parts.get(name, ())) for name in ("train", "eval"))
    keys = [[each.key for each in part] for part in (train, evaluation)]
    lasting = cache is not None and all(key for part in keys for key in part)
    path = cache / f"{store.key_of('copies', duplicates.LAYOUT, keys)}.copies.json" if cache and lasting else None
    # One rank searches, the others wait for what it finds.
    with FileLock(path.with_suffix(".lock")) if path else contextlib.nullcontext():
        if path is not None and (known := _read(path)) is not None:
            return known
        found = duplicates.find_copies([each.file for each in train], [each.file for each in evaluation])
        if path is not None:
            rundir.write_text(path, json.dumps({name: asdict(copies) for name, copies in found.items()}))
        return found


def set_findings(parts: Parts, copies: Mapping[str, Copies], name: str, ignored: Sequence[str]) -> list[Found]:
    """Return what was found in a part as a whole."""
    counted = copies.get(name, Copies())
    return [
        Found(
            finding,
            counted.counts[finding.kind],
            counted.rows,
            tuple(copied_rows(parts, copies, name, finding.kind, MOST_EXAMPLES)),
            finding.severity,
            _searched(counted) if finding.kind != "duplicate" else "",
        )
        for finding in SET_FINDINGS
        if finding.kind not in ignored and counted.counts.get(finding.kind)
    ]


def copied_rows(
    parts: Parts, copies: Mapping[str, Copies], name: str, kind: str, most: int = duplicates.MOST_PAIRS
) -> list[Example]:
    """Return the first rows of a part that are a kind of copy."""
    every = [each for part in ("train", "eval") for each in parts.get(part, ())]
    pairs = copies[name].pairs.get(kind, []) if name in copies else []
    return list(_examples(every, pairs[:most]))


def _searched(copies: Copies) -> str:
    if copies.searched == copies.rows:
        return ""
    return f"near copies were searched for in {copies.searched:,} of the rows, drawn by chance"


def _read(path: Path) -> dict[str, Copies] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {name: Copies(**copies) for name, copies in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _examples(stored: Sequence[Stored], pairs: Sequence[tuple[int, int]]) -> Iterator[Example]:
    for row, like in pairs:
        each, inside = place_of(stored, row)
        other, there = place_of(stored, like)
        kept = each.file.row(inside, each.file.views[0])
        # What is learned, since many begin alike.
        start = int(kept.spans[0, 0]) if len(kept.spans) else 0
        text = shortened(each.encoding.tokenizer.decode(kept.input_ids[start : start + _WORDS].tolist()))
        yield Example(*each.origin(inside), text, "{}:{}".format(*other.origin(there)))


def place_of(stored: Sequence[Stored], at: int) -> tuple[Stored, int]:
    """Return the source of a row, and its number there, by its number in all sources together."""
    for each in stored:
        if at < len(each.file):
            return each, at
        at -= len(each.file)
    raise IndexError(at)
