"""Bad rows, gathered so that several are shown at once."""

from __future__ import annotations

from typing import Any

from ftune.errors import DataError, Place, Problem

MOST_PROBLEMS = 10
"""So many bad rows are shown at once; more would scroll the first one away."""


class Faults:
    """Bad rows so far: raised together, so that they can be mended together."""

    def __init__(self, most: int = MOST_PROBLEMS) -> None:
        self._most = most
        self._problems: list[Problem] = []

    def add(self, problem: Problem) -> None:
        self._problems.append(problem)
        if len(self._problems) >= self._most:
            self.stop()

    def __len__(self) -> int:
        return len(self._problems)

    def stop(self) -> None:
        """Raise what was gathered, if anything."""
        if self._problems:
            raise DataError(*sorted(self._problems, key=_position))


def fault(what: str, file: str, line: int | None = None, *, why: str = "", fix: str = "", **place: Any) -> Problem:
    return Problem("unreadable-row" if line else "unreadable-data", what, Place(file, line, **place), why=why, fix=fix)


def _position(problem: Problem) -> tuple[str, int]:
    return (problem.where.file, problem.where.line or 0) if problem.where else ("", 0)
