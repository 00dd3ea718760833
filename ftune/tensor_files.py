"""The safetensors files that make up a model, and what their headers say, read without torch.

A file is 8 bytes with the length of its header (little-endian), the header as JSON, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune.errors import Problem, RunError

_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    begin: int
    """The first byte, counted from the beginning of the file."""
    end: int
    """The byte after the last."""
    dtype: str
    """As safetensors calls it: `BF16`."""
    shape: tuple[int, ...]


def stored_in(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a model's folder by its name; raises RunError where a file is damaged."""
    return {name: stored for path in weight_files(folder) for name, stored in stored_in_file(path).items()}


def stored_in_file(path: Path) -> dict[str, Stored]:
    """Return the tensors of one file in the order of its header; raises RunError where it is cut short or is none."""
    try:
        size = path.stat().st_size
        with path.open("rb") as content:
            start = 8 + struct.unpack("<Q", content.read(8))[0]
            if start > size:
                raise ValueError("it ends within its header")
            header = json.loads(content.read(start - 8))
        header.pop("__metadata__", None)
        found = {name: _stored(path, start, entry) for name, entry in header.items()}
        if max((stored.end for stored in found.values()), default=start) != size:
            raise ValueError("its tensors do not end where it does")
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        why = "it has no header" if isinstance(error, struct.error) else str(error).split("\n")[0][:300]
        raise damaged(str(path), why) from None
    return found


def _stored(path: Path, start: int, entry: dict[str, Any]) -> Stored:
    begin, end = (start + int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(length) for length in entry["shape"])
    if not isinstance(entry["dtype"], str):
        raise TypeError("a tensor has no type")
    size = _BYTES.get(entry["dtype"])
    if begin < start or (size is not None and end - begin != size * math.prod(shape)):
        raise ValueError("a tensor has another size than its shape says")
    return Stored(path, begin, end, entry["dtype"], shape)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors that make up a model: a folder may hold its weights twice."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise damaged(str(index), f"it cannot be read: {error}") from None
        return [folder / shard for shard in sorted(shards)]
    return sorted(folder.glob("*.safetensors"))


def damaged(path: str, why: str) -> RunError:
    """Return the error for a model file that cannot be read."""
    fix = "copy or download the model again, and compare its size with the original"
    return RunError(Problem(rule="weights-damaged", what=f"`{path}` is damaged or incomplete", why=why, fix=fix))
