"""What a trainer draws from: rows of several sources, mixed and packed by number; the tokens stay on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from torch.utils.data import Dataset

from ftune.data.mixing import Mix
from ftune.data.pack import Groups, packed
from ftune.data.tokens import TokenFile, TokenRow, column


@dataclass(frozen=True)
class Sequences(Dataset):  # type: ignore[misc]
    """Rows, or packed sequences of rows, as columns of numpy arrays."""

    files: tuple[TokenFile, ...]
    """One for each source."""
    names: tuple[str, ...]
    """What the sources are called in the metrics."""
    mix: Mix
    views: tuple[str, ...]
    groups: Groups | None
    """Which rows of the mix share a sequence; None where each stands alone."""
    lengths: numpy.ndarray
    """Tokens of each item, int32."""

    def __len__(self) -> int:
        return len(self.mix) if self.groups is None else len(self.groups)

    def __getitem__(self, at: int) -> dict[str, Any]:
        if not 0 <= at < len(self):
            raise IndexError(at)
        if self.groups is None:
            return self._row(at)
        members = self.groups[at]
        return joined([self.tokens(int(member)) for member in members], [int(self.mix.sources[at]) for at in members])

    def tokens(self, at: int, view: str = "") -> TokenRow:
        """Return the tokens of a row of the mix."""
        return self.files[self.mix.sources[at]].row(int(self.mix.rows[at]), view)

    def _row(self, at: int) -> dict[str, Any]:
        columns: dict[str, Any] = {"source": int(self.mix.sources[at])}
        for view in self.views:
            text = self.tokens(at, view)
            columns |= {
                column(view, "input_ids"): text.input_ids.astype(numpy.int64),
                column(view, "labels"): text.labels,
            }
        return columns

    def learned(self) -> numpy.ndarray:
        """Return the learned tokens of each row of the mix; int32."""
        found = numpy.empty(len(self.mix), dtype=numpy.int32)
        for source, file in enumerate(self.files):
            here = self.mix.sources == source
            found[here] = file.learned()[self.mix.rows[here]]
        return found

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch."""
        return int(self.lengths.sum(dtype=numpy.int64))

    def largest_id(self) -> int:
        return max(file.largest_id() for file in self.files)


def sequences(
    files: Sequence[TokenFile], names: Sequence[str], mix: Mix, views: Sequence[str], *, capacity: int | None
) -> Sequences:
    """Return the rows of a mix, packed into sequences of `capacity` tokens where one is given."""
    by_file = [file.lengths() for file in files]
    lengths = numpy.empty(len(mix), dtype=numpy.int32)
    for source, known in enumerate(by_file):
        here = mix.sources == source
        lengths[here] = known[mix.rows[here]]
    groups = None
    if capacity is not None:
        groups = packed(lengths, capacity)
        lengths = numpy.add.reduceat(lengths[groups.rows], groups.starts[:-1]) if len(groups) else lengths
    return Sequences(tuple(files), tuple(names), mix, tuple(views), groups, lengths)


def joined(rows: Sequence[TokenRow], sources: Sequence[int]) -> dict[str, Any]:
    """Return rows as one sequence; restarting positions tell the model where each begins."""
    return {
        "input_ids": numpy.concatenate([row.input_ids for row in rows]).astype(numpy.int64),
        "labels": numpy.concatenate([row.labels for row in rows]),
        "position_ids": numpy.concatenate([numpy.arange(len(row.input_ids), dtype=numpy.int64) for row in rows]),
        "source": numpy.repeat(numpy.asarray(sources, dtype=numpy.int64), [len(row.input_ids) for row in rows]),
    }
