"""How many rows of each source, and which: the same mix from the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Mix:
    """The rows of several sources as one list: row `rows[i]` of source `sources[i]`."""

    sources: numpy.ndarray
    """int16"""
    rows: numpy.ndarray
    """int32"""

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, most: int | None) -> Mix:
        return self if most is None else Mix(self.sources[:most], self.rows[:most])


def weights_of(given: Sequence[float | None], counts: Sequence[int], temperature: float | None) -> list[float] | None:
    """Return the share of each source, summing to 1; None where every row is to be seen once.

    With a temperature T a source of n rows gets n ** (1 / T): the sampling of multilingual models (Arivazhagan et al.,
    2019). Weights count rows, not tokens; a source without one beside others with one weighs 1.
    """
    if temperature is not None:
        raw = [float(count) ** (1.0 / temperature) for count in counts]
    elif any(weight is not None for weight in given):
        raw = [1.0 if weight is None else float(weight) for weight in given]
    else:
        return None
    return [value / sum(raw) for value in raw]


def mix(counts: Sequence[int], weights: Sequence[float] | None, *, stop: str, seed: int) -> Mix:
    """Return the rows of one epoch.

    Without weights each row comes once, source after source. With weights the numbers of rows are exactly in
    proportion (rounded): `first_exhausted` ends where a source would have to repeat itself, `all_exhausted` where each
    row was seen. What is more than a source's rows repeats all of them before any is seen a further time.
    """
    if weights is None:
        sources = numpy.repeat(numpy.arange(len(counts), dtype=numpy.int16), counts)
        rows = numpy.concatenate([numpy.arange(count, dtype=numpy.int32) for count in counts])
        return Mix(sources, rows)
    epochs = [count / weight for count, weight in zip(counts, weights, strict=True)]
    total = min(epochs) if stop == "first_exhausted" else max(epochs)
    drawn = [
        _drawn(count, round(total * weight), numpy.random.default_rng([seed, number]))
        for number, (count, weight) in enumerate(zip(counts, weights, strict=True))
    ]
    sources = numpy.repeat(numpy.arange(len(counts), dtype=numpy.int16), [len(rows) for rows in drawn])
    order = _interleaved([len(rows) for rows in drawn])
    return Mix(sources[order], numpy.concatenate(drawn)[order])


def _drawn(count: int, wanted: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """Return `wanted` row numbers below `count`: whole passes, and a random part of one."""
    whole, rest = divmod(max(1, wanted), count)
    passes = [numpy.arange(count, dtype=numpy.int32) for _ in range(whole)]
    part = numpy.sort(generator.permutation(count)[:rest]).astype(numpy.int32)
    return numpy.concatenate([*passes, part])


def _interleaved(sizes: Sequence[int]) -> numpy.ndarray:
    """Return an order in which each source's rows are spread evenly, so that a beginning of the mix is a mix too."""
    moments = numpy.concatenate([(numpy.arange(size) + 0.5) / size for size in sizes])
    return numpy.argsort(moments, kind="stable")


def drawn_forever(weights: Sequence[float], seed: int) -> Iterator[int]:
    """Yield sources at random by their weights, for streams, whose number of rows nobody knows."""
    generator = numpy.random.default_rng(seed)
    while True:
        yield from generator.choice(len(weights), size=1024, p=weights).tolist()
