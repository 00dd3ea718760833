"""How the rows are written: as the recipe says, or as the first row looks."""

from __future__ import annotations

from dataclasses import replace

from ftune import plugin
from ftune.data.faults import Faults
from ftune.data.parts import Part
from ftune.data.rows import Row
from ftune.errors import DataError, Place, Problem
from ftune.plugin import Format, RowError
from ftune.recipe.schema import Data


def choose_format(name: str, part: Part, *, whole_text_only: bool) -> Format:
    """Return the format of that name, or for `auto` the only one that fits the first row."""
    known = plugin.names(plugin.FORMATS)
    faults = Faults(most=1)
    row = next(part.rows(faults), None)
    if row is None:
        problem = Problem("no-rows", "there are no rows to train on", Place(", ".join(part.sources)))
        raise DataError(replace(problem, fix="set data.train to files with rows"))
    if name != "auto" and name not in known:
        fix = f"known are {', '.join(known)}"
        raise DataError(Problem("unknown-format", f"there is no data format `{name}`", fix=fix))
    chosen = _detected(row) if name == "auto" else plugin.format_named(name)
    if whole_text_only and not chosen.trains_whole_text:
        raise DataError(
            Problem(
                "not-plain-text",
                f"the rows are `{chosen.name}`, but this objective learns plain text",
                Place(row.file, row.number),
                why="it makes no difference between questions and answers",
                fix="set objective.method: sft, or give rows with a `text` column",
            )
        )
    return chosen


def reads_plain_text(data: Data) -> bool:
    """Return whether the rows, whose format is settled, are learned without a chat template."""
    if data.format not in plugin.names(plugin.FORMATS):
        return False
    known = plugin.format_named(data.format)
    if known.templated is not None:
        return not known.templated
    sources = (data.train,) if isinstance(data.train, str) else tuple(data.train)
    try:
        row = next(Part("train", sources, data.train_split).rows(Faults(most=1)), None)
        return row is None or not known.read(row.values).turns
    except (DataError, RowError, OSError):
        return True  # the rows are gone; this is how most are written


def _detected(row: Row) -> Format:
    formats = [plugin.format_named(name) for name in plugin.names(plugin.FORMATS)]
    fitting = [candidate for candidate in formats if candidate.detect(row.values)]
    if len(fitting) == 1:
        return fitting[0]
    keys = ", ".join(f"`{key}`" for key in row.values)
    where = Place(row.file, row.number)
    if fitting:
        names = ", ".join(candidate.name for candidate in fitting)
        what = f"the first row fits several formats: {names}; its keys are {keys}"
        raise DataError(Problem("ambiguous-format", what, where, fix=f"set data.format to one of {names}"))
    wanted = "; ".join(f"{candidate.name}: {candidate.columns}" for candidate in formats)
    what = f"no format fits the first row; its keys are {keys or 'none'}"
    raise DataError(Problem("unknown-format", what, where, why=f"known are {wanted}", fix="rename the row's keys"))
