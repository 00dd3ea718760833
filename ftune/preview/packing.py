"""Packed sequences to look at: which rows share one, and how full it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from ftune.data.overview import place_of
from ftune.data.pack import packed
from ftune.data.prepare import Stored
from ftune.errors import Problem, RecipeError
from ftune.preview.shown import ShownRow, stored_text
from ftune.recipe.schema import Recipe


@dataclass(frozen=True)
class PackedSequence:
    """Rows that are trained as one sequence; none attends to another."""

    rows: tuple[ShownRow, ...]
    places: int
    """How many tokens it could hold."""

    @property
    def tokens(self) -> int:
        return sum(len(text.tokens) for row in self.rows for text in row.texts)


def packed_sequences(stored: Sequence[Stored], recipe: Recipe, tokenizer: Any, most: int) -> list[PackedSequence]:
    """Return the first sequences of packing, whether the recipe packs or not; RecipeError for rows of two texts."""
    if any(len(each.encoding.format.views) > 1 for each in stored):
        name = stored[0].encoding.format.name
        raise RecipeError(Problem("not-packed", f"`{name}` rows are not packed", fix="leave out --packing"))
    if not stored:
        return []
    lengths = numpy.concatenate([each.file.lengths() for each in stored])
    groups = packed(lengths, recipe.data.max_length)
    return [
        PackedSequence(tuple(_row(stored, int(row), tokenizer) for row in groups[at]), recipe.data.max_length)
        for at in range(min(most, len(groups)))
    ]


def _row(stored: Sequence[Stored], at: int, tokenizer: Any) -> ShownRow:
    each, inside = place_of(stored, at)
    file, number = each.origin(inside)
    text = stored_text(tokenizer, each.file.row(inside, each.file.views[0]))
    return ShownRow(file, number, "".join(token.text for token in text.tokens), (text,))
