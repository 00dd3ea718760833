"""Packed sequences to look at: which rows share one, and how full it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftune.data.mixing import mix
from ftune.data.prepare import Stored
from ftune.data.sequences import Sequences, sequences
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


def packed_sequences(
    stored: Sequence[Stored], rows: Any, recipe: Recipe, tokenizer: Any, most: int
) -> list[PackedSequence]:
    """Return the first sequences of packing, whether the recipe packs or not; RecipeError for rows of two texts.

    `rows` are those of training or evaluation, mixed as they will be; of a stream it is the stored ones, as they come.
    """
    if any(len(each.encoding.format.views) > 1 for each in stored):
        name = stored[0].encoding.format.name
        raise RecipeError(Problem("not-packed", f"`{name}` rows are not packed", fix="leave out --packing"))
    if not stored:
        return []
    files, capacity = [each.file for each in stored], recipe.data.max_length
    streamed = not isinstance(rows, Sequences)
    drawn = mix([len(file) for file in files], None, stop=recipe.data.mixing_stop, seed=0) if streamed else rows.mix
    groups = sequences(files, [""] * len(files), drawn, files[0].views, capacity=capacity).groups
    assert groups is not None
    return [
        PackedSequence(
            tuple(_row(stored[drawn.sources[row]], int(drawn.rows[row]), tokenizer) for row in group), capacity
        )
        for group in (groups[at] for at in range(min(most, len(groups))))
    ]


def _row(each: Stored, inside: int, tokenizer: Any) -> ShownRow:
    file, number = each.origin(inside)
    text = stored_text(tokenizer, each.file.row(inside, each.file.views[0]))
    return ShownRow(file, number, "".join(token.text for token in text.tokens), (text,))
