"""What a run directory holds, as far as it can be read; what cannot is left out, and said."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.errors import Problem, RunError


@dataclass(frozen=True)
class Run:
    """The files of a run directory; a missing or damaged one is empty."""

    spec: dict[str, Any]
    """`run.json`"""
    result: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    samples: tuple[dict[str, Any], ...]
    recipe: str
    overrides: str
    environment: str
    notes: tuple[str, ...]
    """What was left out, in words."""

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the resolved recipe."""
        return _mapping(_mapping(self.spec.get("recipe")).get(name))


def read(directory: Path) -> Run:
    """Return what a run directory holds; raises RunError where it is none."""
    if not (directory / rundir.RUN).is_file():
        what, why = f"{directory} is not a run directory", f"no {directory / rundir.RUN}"
        fix = "name the training.output_dir of a run; `ftune train RECIPE` starts one"
        raise RunError(Problem("report-directory", what, why=why, fix=fix))
    notes: list[str] = []
    spec = _object(directory / rundir.RUN, notes)
    recipe = _text(directory / rundir.RECIPE, notes) or str(spec.get("recipe_text") or "")
    return Run(
        spec=spec,
        result=_object(directory / rundir.RESULT, notes),
        metrics=_lines(directory / rundir.METRICS, notes),
        samples=_lines(directory / rundir.SAMPLES, notes),
        recipe=recipe,
        overrides=_text(directory / rundir.OVERRIDES, notes),
        environment=_text(directory / rundir.ENVIRONMENT, notes),
        notes=tuple(notes),
    )


def _text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror}), and is left out")
        return ""


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path, notes)
    try:
        return dict(json.loads(text)) if text else {}
    except (ValueError, TypeError, RecursionError) as error:
        notes.append(f"{path.name} is damaged ({error}), and is left out")
        return {}


def _lines(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    """Return the objects of a log; the last line of a killed run may be half a line."""
    rows, damaged = [], 0
    # Not splitlines: an answer may hold other characters that end a line, such as U+2028.
    for line in filter(str.strip, _text(path, notes).split("\n")):
        row = _row(line)
        if row is None:
            damaged += 1
        else:
            rows.append(row)
    if damaged:
        lines = "1 line is" if damaged == 1 else f"{damaged} lines are"
        notes.append(f"{path.name}: {lines} damaged, and left out")
    return tuple(rows)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
