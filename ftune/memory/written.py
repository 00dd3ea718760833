"""A trace as a file: columns of numbers, words by their place in a list, compressed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from ftune.memory.events import Event, Owner, Trace, Work

_SIZES = ("host_bytes", "checkpoint_bytes", "model_bytes")
_WORDS = ("owner", "phase", "module", "operation")


def write(trace: Trace, path: Path) -> None:
    words: dict[str, int] = {}
    columns: dict[str, list[int]] = {
        "storage": [event.storage for event in trace.events],
        "size_bytes": [event.size_bytes for event in trace.events],
    }
    for name in _WORDS:
        columns[name] = [words.setdefault(str(_plain(getattr(event, name))), len(words)) for event in trace.events]
    work = [[one.phase, one.operation, one.dtype, one.count, one.flops, one.moved_bytes] for one in trace.work]
    sizes = {name: getattr(trace, name) for name in _SIZES}
    text = json.dumps({"words": list(words), "columns": columns, "work": work, "sizes": sizes})
    path.write_bytes(zlib.compress(text.encode(), 1))


def read(path: Path) -> Trace:
    values = json.loads(zlib.decompress(path.read_bytes()))
    words, columns = values["words"], values["columns"]
    named = [[words[place] for place in columns[name]] for name in _WORDS]
    rows = zip(columns["storage"], columns["size_bytes"], *named, strict=True)
    events = tuple(
        Event(storage, size, Owner(owner), phase, module, operation)
        for storage, size, owner, phase, module, operation in rows
    )
    return Trace(events, tuple(Work(*one) for one in values["work"]), **values["sizes"])


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Owner) else value
