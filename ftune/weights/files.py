"""The tensors of a folder's safetensors files, read one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ftune.models.source import check_weights, refuse_pickles
from ftune.tensor_files import Stored, damaged, stored_in, stored_in_file

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


class Files:
    """The tensors of a folder, found by their names; only what is read takes memory.

    Nothing is mapped: the system may refuse to map files that are larger than its memory. Raises RunError for files
    that are damaged, are missing, or are pickles.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Look into every file of a model that is spoken of as `name`."""
        refuse_pickles(folder, name)
        check_weights(folder, name)
        self._stored = stored_in(folder)
        for stored in self._stored.values():
            _dtype(stored)
        self.shapes = {key: stored.shape for key, stored in self._stored.items()}

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor as it is stored, in memory of its own."""
        stored = self._stored[key]
        with _explained(stored.path), stored.path.open("rb", buffering=0) as content:
            made = torch.empty(stored.shape, dtype=_dtype(stored))
            content.seek(stored.begin)
            rest = memoryview(made.flatten().view(torch.uint8).numpy()) if made.numel() else memoryview(b"")
            while len(rest):
                count = content.readinto(rest)
                if not count:
                    raise OSError(f"it ends within `{key}`")
                rest = rest[count:]
        return made


def _dtype(stored: Stored) -> torch.dtype:
    if stored.dtype not in DTYPES:
        raise damaged(str(stored.path), f"it holds numbers of a type that is no plain one ({stored.dtype})")
    return DTYPES[stored.dtype]


def check(folder: Path) -> None:
    """Raise RunError where a safetensors file of a folder is cut short or is none; reads headers alone."""
    for path in folder.glob("*.safetensors"):
        stored_in_file(path)


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
    first = next(iter(stored_in(folder).values()), None)
    return next((name for name, dtype in NAMES.items() if first and DTYPES.get(first.dtype) is dtype), "float32")
