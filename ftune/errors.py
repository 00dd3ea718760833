"""What can go wrong for a user, and the exit code that says which part it was.

FtuneError              printed without a traceback
|-- RecipeError   2     unknown key, wrong type, broken rule, bad YAML
|-- MachineError  3     missing package, no such device, no room
|-- DataError     4     bad row, wrong columns, nothing to learn from
|-- RunError      5     cannot resume, checkpoint damaged, loss is not a number
`-- Interrupted   130   stopped by the user, after saving

Anything else is a bug in ftune: exit code 1 and a saved crash report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Place:
    """A spot in a file or in a command-line argument; lines and columns count from 1."""

    file: str
    line: int | None = None
    column: int | None = None
    text: str = ""
    """The whole line, so that it can be shown with a caret."""
    length: int = 1
    """How many characters the caret underlines."""

    def __str__(self) -> str:
        parts = [self.file, self.line, self.column] if self.line is not None else [self.file]
        return ":".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where, why, and how to mend it."""

    rule: str
    what: str
    where: Place | None = None
    label: str = ""
    """Short text beside the caret."""
    why: str = ""
    fix: str = ""
    also: tuple[tuple[Place, str], ...] = ()
    """Other places that take part, each with its label."""
    severity: Severity = "error"

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return "; ".join(part for part in (place + self.what, self.why, self.fix) if part)


class FtuneError(Exception):
    """Base of every error a user can cause or mend."""

    exit_code = 1

    def __init__(self, *problems: Problem | str) -> None:
        """Take problems; or text, from which PyTorch rebuilds what was raised in a data loader's worker."""
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(
            Problem("worker", problem) if isinstance(problem, str) else problem for problem in problems
        )


class RecipeError(FtuneError):
    """The recipe says something that cannot be."""

    exit_code = 2


class MachineError(FtuneError):
    """This machine cannot do what the recipe asks."""

    exit_code = 3


class DataError(FtuneError):
    """The data are not what the recipe says they are."""

    exit_code = 4


class RunError(FtuneError):
    """The run itself went wrong; what was saved before stays."""

    exit_code = 5


class Interrupted(FtuneError):  # noqa: N818 (nothing went wrong)
    """The user stopped the run; everything was saved first."""

    exit_code = 130
