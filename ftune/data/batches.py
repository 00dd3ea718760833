"""Which rows share a batch: rows of like length, or as many as fit a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
from torch.utils.data import Sampler

_STRETCH = 50
"""Batches' worth of shuffled rows that are sorted together: the more, the less padding and the less chance."""


def batches_of(
    lengths: numpy.ndarray, *, rows: int, most_tokens: int | None, ranks: int, seed: int
) -> list[numpy.ndarray]:
    """Return batches of row numbers, longest rows first within a batch; each row in exactly one.

    Rows are shuffled, then sorted by length within stretches, and taken `rows` at a time, or as many as `most_tokens`
    tokens hold once padded. The number of batches is a multiple of `ranks`, so that no rank waits for another.
    """
    generator = numpy.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    mean = max(1.0, float(lengths.mean())) if len(lengths) else 1.0
    stretch = _STRETCH * (rows if most_tokens is None else max(1, int(most_tokens / mean)))
    found: list[numpy.ndarray] = []
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]
        part = part[numpy.argsort(-lengths[part], kind="stable")]
        found += _cut(part, lengths, rows=rows, most_tokens=most_tokens)
    return _in_step(found, ranks)


def _cut(part: numpy.ndarray, lengths: numpy.ndarray, *, rows: int, most_tokens: int | None) -> list[numpy.ndarray]:
    if most_tokens is None:
        return [part[at : at + rows] for at in range(0, len(part), rows)]
    found, at = [], 0
    while at < len(part):
        # Sorted by length, so the first row is what the others are padded to.
        fitting = max(1, most_tokens // max(1, int(lengths[part[at]])))
        found.append(part[at : at + fitting])
        at += fitting
    return found


def _in_step(batches: list[numpy.ndarray], ranks: int) -> list[numpy.ndarray]:
    """Return batches whose number is a multiple of the ranks: the largest are split, and a row repeated at need."""
    batches = list(batches)
    while len(batches) % ranks:
        largest = max(range(len(batches)), key=lambda at: len(batches[at]))
        whole = batches[largest]
        half = len(whole) // 2
        if half == 0:
            batches.append(whole)
            continue
        batches[largest : largest + 1] = [whole[:half], whole[half:]]
    return batches


class PlannedBatches(Sampler[list[int]]):
    """One rank's batches; their order changes with the epoch, their number never."""

    def __init__(
        self, batches: list[numpy.ndarray], lengths: numpy.ndarray, *, rank: int, ranks: int, seed: int
    ) -> None:
        self.batches, self.rank, self.ranks, self.seed = batches, rank, ranks, seed
        self.epoch = 0
        places = [len(batch) * int(lengths[batch].max()) for batch in batches]
        self._largest = places.index(max(places)) // ranks if places else 0
        """The step that takes the most memory."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches) // self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        # Ranks step together: neighbours in the list are alike in length, and share a step.
        steps = numpy.random.default_rng([self.seed, self.epoch]).permutation(len(self))
        if self.epoch == 0 and len(steps):
            # What does not fit into memory is then known at the first step, and not in the tenth hour.
            at = int(numpy.flatnonzero(steps == self._largest)[0])
            steps[[0, at]] = steps[[at, 0]]
        for step in steps:
            yield self.batches[int(step) * self.ranks + self.rank].tolist()


def padding_share(lengths: numpy.ndarray, batches: list[numpy.ndarray]) -> float:
    """Return which share of a batch's places is padding, over all batches."""
    places = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - float(lengths.sum()) / places if places else 0.0


def random_batches(count: int, rows: int, seed: int) -> list[numpy.ndarray]:
    """Return batches as chance makes them, to know how much padding they have."""
    order = numpy.random.default_rng(seed).permutation(count)
    return [order[at : at + rows] for at in range(0, count, rows)]
