"""The tensors of a folder's safetensors files, read one at a time."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ftune.models.source import check_weights, damaged, refuse_pickles, weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights may be stored in, by the names of configurations and of `--dtype`."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies."""

    path: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Files:
    """The tensors of a folder, found by their names; only what is read takes memory.

    Nothing is mapped: the system may refuse to map files that are larger than its memory. Raises RunError for files
    that are damaged, are missing, or are pickles.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Look into every file of a model that is spoken of as `name`."""
        refuse_pickles(folder, name)
        check_weights(folder, name)
        self._places: dict[str, _Place] = {}
        for path in weight_files(folder):
            self._places.update(_places(path))
        self.shapes = {key: place.shape for key, place in self._places.items()}

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor as it is stored, in memory of its own."""
        place = self._places[key]
        made = torch.empty(place.shape, dtype=place.dtype)
        with _explained(place.path), place.path.open("rb", buffering=0) as content:
            content.seek(place.begin)
            rest = memoryview(made.flatten().view(torch.uint8).numpy()) if made.numel() else memoryview(b"")
            while len(rest):
                count = content.readinto(rest)
                if not count:
                    raise OSError(f"it ends within `{key}`")
                rest = rest[count:]
        return made


def _places(path: Path) -> dict[str, _Place]:
    check_file(path)
    with _explained(path), path.open("rb") as content:
        length = struct.unpack("<Q", content.read(8))[0]
        header = json.loads(content.read(length))
        header.pop("__metadata__", None)
        return {
            key: _Place(path, 8 + length + entry["data_offsets"][0], _dtype(entry["dtype"]), tuple(entry["shape"]))
            for key, entry in header.items()
        }


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise OSError(f"it holds numbers of a type that is no plain one ({name})")
    return DTYPES[name]


def check(folder: Path) -> None:
    """Raise RunError where a safetensors file of a folder is cut short or is none; reads headers alone."""
    for path in sorted(folder.glob("*.safetensors")):
        check_file(path)


def check_file(path: Path) -> None:
    """Raise RunError where a file is no safetensors, or is cut short."""
    # Numpy maps it read-only, which takes no memory however large the file is.
    with _explained(path), safe_open(path, framework="np") as opened:
        opened.keys()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise damaged(str(path), str(error).split("\n")[0][:300]) from None


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of one file."""
    with _explained(path), safe_open(path, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (not a mapping)


def stored_dtype(folder: Path, config: dict[str, Any]) -> str:
    """Return what a model's weights are stored in: as its configuration says, else as the first tensor is."""
    said = config.get("dtype") or config.get("torch_dtype")
    if said in NAMES:
        return str(said)
    for path in weight_files(folder):
        for place in _places(path).values():
            return next((name for name, dtype in NAMES.items() if dtype is place.dtype), "float32")
    return "float32"
