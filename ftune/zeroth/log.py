"""The log of a run: 12 bytes a step, from which the initial weights become the trained ones again.

The file begins with one line of JSON: how weights are rounded, their names in the order of their numbers, each one's
decay, and the step of the first entry. Then come entries of a uint32 (the step's seed), a float32 (the projected
gradient) and a float32 (the learning rate), little-endian.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ftune.errors import Problem, RunError
from ftune.fused.rounding import Kind
from ftune.zeroth.rest import Rest

NAME = "zeroth_order.log"
CHOSEN = "zeroth_order.safetensors"
"""Beside the log, where not all entries move: which ones do, flat places by the weight's name."""
VERSION = 2
_ENTRY = struct.Struct("<Iff")


@dataclass(frozen=True)
class Header:
    """What all steps share."""

    rounding: Kind
    names: tuple[str, ...]
    decays: tuple[float, ...]
    sparse: bool = False
    rest: Rest | None = None
    """How the entries that never move were held, where not as the model has them."""
    first_step: int = 0
    version: int = VERSION

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True)
class Entry:
    """One step; float32 values, and the step was computed with these."""

    seed: int
    gradient: float
    rate: float


def float32(value: float) -> float:
    """Return the nearest number that an entry can hold."""
    return float(torch.tensor(value, dtype=torch.float64).float())


class Writer:
    """Appends to the log of a run directory."""

    def __init__(self, directory: Path, header: Header) -> None:
        self._path, self._header = directory / NAME, header
        self._open = False

    def append(self, step: int, entry: Entry, chosen: list[torch.Tensor | None]) -> None:
        """Write the entry of a step, counted from 0; before the first one, forget what comes after it."""
        if not self._open:
            self._begin(step, chosen)
            self._open = True
        with self._path.open("ab") as out:
            out.write(_ENTRY.pack(entry.seed, entry.gradient, entry.rate))

    def _begin(self, step: int, chosen: list[torch.Tensor | None]) -> None:
        """Cut the log back to a step; where it does not reach that far, begin one that says so."""
        if self._path.is_file() and step:
            try:
                header, start = _header(self._path)
            except RunError:
                header, start = self._header, 0
            wanted = start + (step - header.first_step) * _ENTRY.size
            same = replace(header, first_step=0) == self._header
            if same and start and start <= wanted <= self._path.stat().st_size:
                os.truncate(self._path, wanted)
                return
        self._path.write_bytes(replace(self._header, first_step=step).line())
        if self._header.sparse:
            _write_chosen(self._path.with_name(CHOSEN), self._header.names, chosen)


def _write_chosen(path: Path, names: tuple[str, ...], chosen: list[torch.Tensor | None]) -> None:
    from safetensors.torch import save_file

    tensors = {name: places.cpu() for name, places in zip(names, chosen, strict=True) if places is not None}
    save_file(tensors, path)


def read_chosen(directory: Path, header: Header) -> list[torch.Tensor | None]:
    """Return which entries of each weight move; None where all do. Raises RunError where the file is missing."""
    if not header.sparse:
        return [None] * len(header.names)
    from safetensors.torch import load_file

    path = directory / CHOSEN
    if not path.is_file():
        raise _unreadable(path, "it says which entries moved, and is missing")
    found = load_file(path)
    return [found.get(name) for name in header.names]


def chosen_by(directory: Path, names: tuple[str, ...], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the entries that an earlier run chose, for weights of these names.

    Raises RunError where the directory holds no choice, or one for other weights.
    """
    header, _ = _header(directory / NAME)
    found = dict(zip(header.names, read_chosen(directory, header), strict=True))
    for name, weight in zip(names, weights, strict=True):
        places = found.get(name)
        if places is None or (len(places) and int(places[-1]) >= weight.numel()):
            what = f"the run `{directory}` chose no entries of `{name}`"
            why = "it trained other weights, or all entries of them"
            fix = "name a run of sparse_mezo on the same model and tuning, or leave `mask` out"
            raise RunError(Problem("zeroth-order-mask", what, why=why, fix=fix))
    return [found[name].to(weight.device) for name, weight in zip(names, weights, strict=True)]


def read(directory: Path) -> tuple[Header, tuple[Entry, ...]]:
    """Return a run's log; half an entry, which a killed run may leave, is left out. Raises RunError."""
    path = directory / NAME
    header, start = _header(path)
    packed = path.read_bytes()[start:]
    whole = packed[: len(packed) // _ENTRY.size * _ENTRY.size]
    return header, tuple(Entry(*values) for values in _ENTRY.iter_unpack(whole))


def _header(path: Path) -> tuple[Header, int]:
    """Return the header and where the entries begin."""
    try:
        with path.open("rb") as lines:
            line = lines.readline()
        values = json.loads(line)
        rest = None if values["rest"] is None else Rest(**values["rest"])
        values |= {"names": tuple(values["names"]), "decays": tuple(values["decays"]), "rest": rest}
        header = Header(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, str(error).split("\n", maxsplit=1)[0]) from None
    if header.version != VERSION:
        raise _unreadable(path, f"it was written by another ftune: version {header.version}, not {VERSION}")
    return header, len(line)


def _unreadable(path: Path, why: str) -> RunError:
    fix = "only runs of the optimizers mezo and sparse_mezo have a log; use the run's model or a checkpoint"
    return RunError(Problem("zeroth-order-log", f"`{path}` cannot be read", why=why, fix=fix))
