"""What every method says of itself."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from ftune.options import Options


class Plugin(ABC):
    """What every method says of itself."""

    name: ClassVar[str]
    """The module's own name, and what a recipe calls it."""
    summary: ClassVar[str]
    """One line for `ftune explain`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Import names of packages without which it cannot run."""
    Options: ClassVar[type[Options]] = Options
