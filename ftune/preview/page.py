"""The preview as one self-contained HTML page: rows to filter and search, and the audit."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ftune import rundir
from ftune.errors import DataError, Problem, RunError
from ftune.preview.look import Look
from ftune.preview.shown import ShownRow, ShownToken
from ftune.preview.terminal import facts, visible
from ftune.report import plots

_HERE = Path(__file__)


@dataclass(frozen=True)
class Drawn:
    """One part of the data: its figures, its histogram, its findings."""

    name: str
    facts: tuple[tuple[str, str], ...]
    plot: plots.Plot | None
    findings: tuple[dict[str, Any], ...]


def write(path: Path, seen: Look, name: str) -> Path:
    """Write the page; raises RunError where there is no room."""
    # Half a surrogate pair, which no UTF-8 file can hold, may be in a name.
    text = render(seen, name).encode("utf-8", "replace").decode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_text(path, text)
    except OSError as error:
        fix = "name a file in a directory that can be written to"
        raise RunError(Problem("preview-write", f"cannot write {path}", why=str(error), fix=fix)) from None
    return path


def render(seen: Look, name: str) -> str:
    """Return the text of the page: the rows asked for, then others in which something was found."""
    rows = list(seen.rows())
    audit: dict[str, Any] = {"notes": []}
    problems: tuple[Problem, ...]
    try:
        audit, problems, rows = seen.audit(), seen.fatal, list(seen.marked())
        shown = {(row.file, row.number) for row in rows}
        rows += [row for row in seen.examples() if (row.file, row.number) not in shown]
    except DataError as error:  # told on the page too, and raised again by whoever asks what is fatal
        problems = error.problems
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    script = _HERE.with_name("page.js").read_text(encoding="utf-8")
    return environment.from_string(_HERE.with_name("page.html").read_text(encoding="utf-8")).render(
        name=name,
        part=seen.wanted.part,
        rows=rows,
        kinds=sorted({kind for row in rows for kind in row.problems}),
        parts=[_drawn(part, audit[part]) for part in ("train", "eval") if part in audit],
        notes=audit["notes"],
        problems=problems,
        visible=visible,
        words=_words,
        written=_written,
        script=Markup(script),  # ours; its digest is all that the page allows to run
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        svg=Markup,
    )


def _drawn(name: str, part: dict[str, Any]) -> Drawn:
    lengths = part["lengths"]
    plot = plots.histogram(name, "tokens of a row", lengths["edges"], lengths["counts"]) if lengths else None
    return Drawn(name, tuple(facts(part)), plot, tuple(part["findings"]))


def _words(row: ShownRow) -> str:
    """Return what a search looks through: where a row stands and all its texts."""
    texts = ["".join(token.text for token in text.tokens) for text in row.texts]
    return visible(" ".join([row.place, row.text, *texts[1:]])).lower()


def _written(token: ShownToken) -> str:
    """Return a token's text; where it is learned, its line breaks can be seen."""
    text = visible(token.text) if token.text else "\u2025"
    return text.replace("\n", "\u21b5\n") if token.learned else text
