"""How long rows are, and how much of a batch is padding under each way of putting rows together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from ftune.data.batches import batches_of, padding_share, random_batches
from ftune.data.pack import packed
from ftune.recipe.schema import Data, Training

if TYPE_CHECKING:
    from ftune.data.prepare import Stored

_BINS = 24
_MOST = 100_000
"""So many rows tell the share of padding; of more, so many by chance."""
_SHARES = (50, 95, 99)

NOW = "now"
"""What the recipe's own batches are called."""


def length_summary(lengths: numpy.ndarray) -> dict[str, Any]:
    """Return the distribution of the rows' tokens: percentiles, and counts between edges of whole numbers."""
    if not len(lengths):
        return {}
    longest, shortest = int(lengths.max()), int(lengths.min())
    width = max(1, -(-(longest - shortest + 1) // _BINS))
    edges = numpy.arange(shortest, longest + width + 1, width)
    counts, _ = numpy.histogram(lengths, bins=edges)
    values = {f"p{share}": int(numpy.percentile(lengths, share, method="inverted_cdf")) for share in _SHARES}
    about = {"shortest": shortest, "mean": round(float(lengths.mean()), 1), **values, "longest": longest}
    return {**about, "edges": edges.tolist(), "counts": counts.tolist()}


def padding_of(stored: Sequence[Stored], data: Data, training: Training) -> dict[str, float]:
    """Return `padding` of the rows of all training sources; rows of several texts are not packed."""
    lengths = numpy.concatenate([each.file.lengths() for each in stored])
    packs = all(len(each.encoding.format.views) == 1 for each in stored)
    return padding(lengths, data, training, packs=packs)


def padding(lengths: numpy.ndarray, data: Data, training: Training, *, packs: bool) -> dict[str, float]:
    """Return which share of the places in training batches is padding: as the recipe has it, and otherwise.

    The budget of tokens, where the recipe has none, is what its largest batch holds: the same peak memory.
    """
    if not len(lengths):
        return {}
    rows, seed = training.rows_at_once, training.seed
    if len(lengths) > _MOST:
        lengths = lengths[numpy.sort(numpy.random.default_rng(0).choice(len(lengths), _MOST, replace=False))]
    budget = training.max_tokens_per_batch or rows * int(lengths.max())
    found = {
        "random": padding_share(lengths, random_batches(len(lengths), rows, seed)),
        "group_by_length": padding_share(lengths, batches_of(lengths, rows=rows, most_tokens=None, ranks=1, seed=seed)),
        "max_tokens_per_batch": padding_share(
            lengths, batches_of(lengths, rows=rows, most_tokens=budget, ranks=1, seed=seed)
        ),
    }
    if packs:
        groups = packed(lengths, data.max_length)
        whole = numpy.add.reduceat(lengths[groups.rows], groups.starts[:-1])
        found["packing"] = padding_share(whole, random_batches(len(whole), rows, seed))
    chosen = "random"
    if training.max_tokens_per_batch is not None:
        chosen = "max_tokens_per_batch"
    elif training.group_by_length:
        chosen = "group_by_length"
    elif data.packing and packs:
        chosen = "packing"
    return {NOW: round(found[chosen], 4), **{name: round(share, 4) for name, share in found.items()}}
