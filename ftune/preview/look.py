"""What `ftune preview` shows, gathered: some rows as tokens, then the audit of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ftune import plugin
from ftune.cache import cache_directory
from ftune.data.audit import RowChecks
from ftune.data.cache import writable
from ftune.data.faults import Faults
from ftune.data.overview import copied_rows, set_findings
from ftune.data.parts import Worked
from ftune.data.prepare import Prepared, Reading, prepare, readings_of
from ftune.errors import DataError, Problem, RecipeError
from ftune.findings import SET_FINDINGS, unknown_finding
from ftune.models.load import load_tokenizer
from ftune.preview.audit import audit_of
from ftune.preview.packing import PackedSequence, packed_sequences
from ftune.preview.shown import ShownRow, shown_row
from ftune.recipe.schema import Recipe

_BATCH = 64


@dataclass(frozen=True)
class Wanted:
    """Which rows to show."""

    rows: int = 3
    part: str = "train"
    problem: str | None = None
    """Only rows with this finding."""
    positions: bool = False
    """Each token with its position and id."""
    packing: bool = False
    """Packed sequences instead of rows."""


@dataclass
class Look:
    """The rows of a recipe, worked on when they are asked for."""

    recipe: Recipe
    wanted: Wanted
    tokenizer: Any
    readings: tuple[Reading, ...]
    faults: Faults = field(default_factory=Faults)
    """Rows that cannot be read, met while looking for those to show."""

    @property
    def prepared(self) -> Prepared:
        """Every row as tokens, as training would have it; DataError where it would get none."""
        if isinstance(self._prepared, DataError):
            raise self._prepared
        return self._prepared

    @cached_property
    def _prepared(self) -> Prepared | DataError:
        try:
            return prepare(
                self.recipe.data,
                tokenizer=self.tokenizer,
                seed=self.recipe.training.seed,
                cache=cache_directory() / "tokens",
                learns=plugin.objective(self.recipe.objective.method).formats,
                strict=False,
            )
        except DataError as error:
            return error

    @property
    def fatal(self) -> tuple[Problem, ...]:
        return self.prepared.fatal

    def rows(self) -> Iterator[ShownRow]:
        """Yield the rows asked for, of each source in turn."""
        kind, part = self.wanted.problem, self.wanted.part
        if kind in {finding.kind for finding in SET_FINDINGS}:
            assert kind is not None
            places = copied_rows(self.prepared.seen, self.prepared.copies, part, kind, self.wanted.rows)
            yield from self.at([(each.file, each.number) for each in places], kind)
            return
        for reading in self.readings:
            yield from itertools.islice(self._having(reading, kind), self.wanted.rows)

    def marked(self) -> Iterator[ShownRow]:
        """Yield the rows asked for, with what only the whole set shows: that they are copies."""
        yield from self._with_copies(self.rows())

    def _with_copies(self, rows: Iterable[ShownRow]) -> Iterator[ShownRow]:
        part, seen, copies = self.wanted.part, self.prepared.seen, self.prepared.copies
        wanted = [found.kind for found in SET_FINDINGS if found.kind not in self.recipe.data.audit_ignore]
        kinds = {(one.file, one.number): kind for kind in wanted for one in copied_rows(seen, copies, part, kind)}
        for row in rows:
            kind = kinds.get((row.file, row.number))
            yield row.having(kind) if kind else row

    def at(self, places: Sequence[tuple[str, int]], kind: str | None = None) -> Iterator[ShownRow]:
        """Yield the rows that stand at some places, in the order of the files."""
        left = set(places)
        for reading in self.readings:
            for row in self._each(reading, lambda worked: (worked.row.file, worked.row.number) in left):
                left.discard((row.file, row.number))
                yield row.having(kind) if kind else row
                if not left:
                    return

    def examples(self) -> Iterator[ShownRow]:
        """Yield the rows that the audit names as examples."""
        part, ignored, seen = self.wanted.part, self.recipe.data.audit_ignore, self.prepared.seen
        found = [one for each in seen.get(part, ()) for one in each.found(ignored)]
        found += set_findings(seen, self.prepared.copies, part, ignored)
        yield from self._with_copies(self.at([(one.file, one.number) for each in found for one in each.examples]))

    def audit(self) -> dict[str, Any]:
        return audit_of(self.prepared, self.recipe, self.tokenizer)

    def packed(self) -> list[PackedSequence]:
        """Return the first sequences that packing makes of the rows."""
        rows = self.prepared.train if self.wanted.part == "train" else self.prepared.eval
        stored = self.prepared.seen.get(self.wanted.part, ())
        return packed_sequences(stored, rows, self.recipe, self.tokenizer, self.wanted.rows)

    def _having(self, reading: Reading, kind: str | None) -> Iterator[ShownRow]:
        return (row for row in self._each(reading) if kind is None or kind in row.problems)

    def _each(self, reading: Reading, fits: Callable[[Worked], bool] | None = None) -> Iterator[ShownRow]:
        checks = RowChecks(reading.encoding)
        data, size = self.recipe.data, 1 if self.wanted.rows < _BATCH else _BATCH
        most = data.max_train_samples if self.wanted.part == "train" else data.max_eval_samples
        rows = replace(reading.part, most=most).rows(self.faults)
        while taken := list(itertools.islice(rows, size)):
            size = _BATCH
            for worked in reading.encoding.worked(taken, self.faults):
                if fits is None or fits(worked):
                    yield shown_row(self.tokenizer, worked, reading.encoding, checks.kinds(worked))


def look(recipe: Recipe, wanted: Wanted) -> Look:
    """Return the rows of a decided recipe to look at; RecipeError for what it does not have."""
    if wanted.problem is not None and (problem := unknown_finding(wanted.problem)) is not None:
        raise RecipeError(problem)
    if wanted.part == "eval" and recipe.data.eval is None:
        what = "there are no evaluation rows to show"
        raise RecipeError(Problem("no-eval", what, fix="set data.eval, or leave out --part eval"))
    tokenizer = load_tokenizer(recipe.model)
    learns = plugin.objective(recipe.objective.method).formats
    cache = writable(cache_directory() / "tokens")
    readings = readings_of(recipe.data, tokenizer=tokenizer, seed=recipe.training.seed, cache=cache, learns=learns)
    return Look(recipe, wanted, tokenizer, readings[wanted.part])
