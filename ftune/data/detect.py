"""How the rows are written: as the recipe says, or as the first row looks."""

from __future__ import annotations

from dataclasses import replace

from ftune import plugin
from ftune.data.faults import Faults
from ftune.data.parts import Part
from ftune.data.rows import Row
from ftune.errors import DataError, Place, Problem
from ftune.plugin import Format, RowError
from ftune.recipe.schema import Data, listed


def choose_format(name: str, part: Part, learns: frozenset[str] | None) -> Format:
    """Return the format of that name, or for `auto` the only one that fits the first row.

    `learns` names the formats that the objective learns from; without it, those of any objective. Where a row can be
    read in several ways, it decides: conversations with two answers are `messages` or `preference`.
    """
    known = plugin.names(plugin.FORMATS)
    faults = Faults(most=1)
    row = next(part.rows(faults), None)
    if row is None:
        problem = Problem("no-rows", "there are no rows to train on", Place(part.source))
        raise DataError(replace(problem, fix="set data.train to files with rows"))
    if name != "auto" and name not in known:
        fix = f"known are {', '.join(known)}"
        raise DataError(Problem("unknown-format", f"there is no data format `{name}`", fix=fix))
    if learns is None:
        learns = frozenset().union(*(plugin.objective(method).formats for method in plugin.names(plugin.OBJECTIVES)))
    chosen = _detected(row, learns) if name == "auto" else plugin.format_named(name)
    whole_text_only = all(plugin.format_named(each).trains_whole_text for each in learns)
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
    if chosen.name not in learns:
        raise DataError(_not_learned(row, chosen, learns))
    return chosen


def reads_plain_text(data: Data) -> bool:
    """Return whether the rows, whose format is settled, are learned without a chat template."""
    if data.format not in plugin.names(plugin.FORMATS):
        return False
    known = plugin.format_named(data.format)
    if known.templated is not None:
        return not known.templated
    try:
        row = next(Part("train", listed(data.train)[0].path, data.train_split).rows(Faults(most=1)), None)
        return row is None or not known.read(row.values).turns
    except (DataError, RowError, OSError):
        return True  # the rows are gone; this is how most are written


def _detected(row: Row, learns: frozenset[str]) -> Format:
    formats = [plugin.format_named(name) for name in plugin.names(plugin.FORMATS)]
    fitting = [candidate for candidate in formats if candidate.detect(row.values)]
    fitting = [candidate for candidate in fitting if candidate.name in learns] or fitting
    if len(fitting) == 1:
        return fitting[0]
    keys = ", ".join(f"`{key}`" for key in row.values)
    where = Place(row.file, row.number)
    if fitting:
        names = ", ".join(candidate.name for candidate in fitting)
        what = f"the first row fits several formats: {names}; its keys are {keys}"
        raise DataError(Problem("ambiguous-format", what, where, fix=f"set data.format to one of {names}"))
    wanted = "; ".join(f"{candidate.name}: {candidate.columns}" for candidate in formats if candidate.name in learns)
    what = f"no format fits the first row; its keys are {keys or 'none'}"
    raise DataError(Problem("unknown-format", what, where, why=f"known are {wanted}", fix="rename the row's keys"))


def _not_learned(row: Row, chosen: Format, learns: frozenset[str]) -> Problem:
    methods = plugin.names(plugin.OBJECTIVES)
    learners = [method for method in methods if chosen.name in plugin.objective(method).formats]
    keys = ", ".join(f"`{key}`" for key in row.values)
    fix = f"rename the row's keys, or set data.format to one of {', '.join(sorted(learns))}"
    if learners:
        fix = f"set objective.method: {' or '.join(learners)}; otherwise {fix}"
    return Problem(
        "format-not-learned",
        f"the rows are `{chosen.name}`, which this objective cannot learn from; their keys are {keys}",
        Place(row.file, row.number),
        why=f"a row of `{chosen.name}` is {chosen.columns}",
        fix=fix,
    )
