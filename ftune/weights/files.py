"""The tensors of a folder's safetensors files, read one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ftune.models.source import check_weights, damaged, refuse_pickles, weight_files

BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights may be stored in, by the names of configurations and of `--dtype`."""


class Files:
    """The tensors of a folder, found by their names; only what is read takes memory.

    Raises RunError for files that are damaged, are missing, or are pickles.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Open every file of a model that is spoken of as `name`."""
        refuse_pickles(folder, name)
        check_weights(folder, name)
        self._stack = contextlib.ExitStack()
        self._opened: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in weight_files(folder):
            for key, opened in self._open(path):
                entry = opened.get_slice(key)
                self._opened[key] = opened
                self.shapes[key] = tuple(entry.get_shape())
                self.dtypes[key] = entry.get_dtype()

    def _open(self, path: Path) -> list[tuple[str, Any]]:
        with _explained(path):
            opened = self._stack.enter_context(safe_open(path, framework="pt"))
            return [(key, opened) for key in opened.keys()]  # noqa: SIM118  (not a mapping)

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor as it is stored, in memory of its own."""
        tensor: torch.Tensor = self._opened[key].get_tensor(key)
        return tensor


def check(folder: Path) -> None:
    """Raise RunError where a safetensors file of a folder is cut short or is none; reads headers alone."""
    for path in sorted(folder.glob("*.safetensors")):
        with _explained(path), safe_open(path, framework="pt") as opened:
            opened.keys()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise damaged(str(path), str(error).split("\n")[0][:300]) from None


def stored_dtype(folder: Path, config: dict[str, Any]) -> str:
    """Return what a model's weights are stored in: as its configuration says, else as the first tensor is."""
    said = config.get("dtype") or config.get("torch_dtype")
    if said in NAMES:
        return str(said)
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                kind = tensors.get_slice(key).get_dtype()
                return {"BF16": "bfloat16", "F16": "float16"}.get(kind, "float32")
    return "float32"
