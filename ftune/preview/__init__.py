"""Rows as the model will see them, token by token, and what is odd about all of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ftune.data.faults import MOST_PROBLEMS
from ftune.errors import DataError
from ftune.preview.look import Look, Wanted, look
from ftune.recipe.schema import Recipe

__all__ = ["Look", "Wanted", "look", "show"]


def show(recipe: Recipe, wanted: Wanted, *, name: str, as_json: bool = False, html: Path | None = None) -> None:
    """Print rows and their audit, as text, as JSON or into a page; DataError for what would stop a run."""
    seen = look(recipe, wanted)
    if html is not None:
        from ftune.preview import page

        print(page.write(html, seen, name))
    elif as_json:
        _as_lines(seen)
    else:
        _on_terminal(seen)
    if seen.fatal:
        raise DataError(*seen.fatal[:MOST_PROBLEMS])


def _as_lines(seen: Look) -> None:
    try:
        rows = list(seen.marked())
    except DataError:  # raised again by the audit: the rows that can be read are shown first
        rows = list(seen.rows())
    for row in rows:
        print(json.dumps(row.as_line()))
    print(json.dumps({"audit": seen.audit()}))


def _on_terminal(seen: Look) -> None:
    from ftune.preview.terminal import Printer

    printer, wanted = Printer(sys.stdout), seen.wanted
    if wanted.rows:
        printer.legend()
    if wanted.packing:
        for number, sequence in enumerate(seen.packed(), start=1):
            printer.sequence(number, sequence, positions=wanted.positions)
    else:
        shown = False
        for row in seen.rows():
            printer.row(row, positions=wanted.positions)
            shown = True
        if wanted.problem and wanted.rows and not shown:
            printer.say(f"no row of {wanted.part} is `{wanted.problem}`")
    sys.stdout.flush()
    printer.audit(seen.audit())
