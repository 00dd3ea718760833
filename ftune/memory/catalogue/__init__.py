"""Configurations of well-known models, so that a run can be planned before anything is downloaded.

`configs` holds what their config.json says, `models.json` how many parameters they are known to have, where that number
is from, and which other models have the same shapes.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ftune.errors import Problem, RecipeError

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class KnownModel:
    """A model of the catalogue."""

    name: str
    """As on the hub."""
    parameters: int
    """As published; a tied embedding counts once."""
    source: str
    also: tuple[str, ...] = ()
    """Models of the same shapes. They may differ in positions and in dtype."""

    @property
    def folder(self) -> Path:
        """The directory that holds its config.json."""
        return _HERE / "configs" / self.name.replace("/", "--")


@cache
def known_models() -> tuple[KnownModel, ...]:
    """Return every model of the catalogue."""
    rows = json.loads((_HERE / "models.json").read_text(encoding="utf-8"))
    return tuple(KnownModel(name, row["parameters"], row["source"], tuple(row["also"])) for name, row in rows.items())


def find(name: str) -> KnownModel | None:
    """Return the model of a name, in any case and without its organisation too; None where none or several fit."""
    found = _by_name().get(name.strip().lower(), ())
    return found[0] if len(found) == 1 else None


def folder_of(name: str) -> Path:
    """Return the directory whose config.json describes a model of the catalogue; raises RecipeError for any other."""
    model = find(name)
    if model is not None:
        return model.folder
    near = _near(name)
    fix = f"did you mean {' or '.join(f'`{one}`' for one in near)}? " if near else ""
    fix += "A directory with the model's config.json always works"
    what = f"no configuration of `{name}` comes with ftune"
    raise RecipeError(Problem("unknown-configuration", what, fix=fix))


@cache
def _by_name() -> dict[str, tuple[KnownModel, ...]]:
    found: dict[str, tuple[KnownModel, ...]] = {}
    for model in known_models():
        for name in (model.name, *model.also):
            for spelling in {name.lower(), name.lower().rpartition("/")[2]}:
                there = found.get(spelling, ())
                found[spelling] = there if model in there else (*there, model)
    return found


def _near(name: str) -> list[str]:
    wanted = name.strip().lower().rpartition("/")[2][:80]
    ends = {one.rpartition("/")[2].lower(): one for model in known_models() for one in (*model.also, model.name)}
    close = difflib.get_close_matches(wanted, list(ends), n=3, cutoff=0.6)
    inside = [end for end in ends if len(wanted) > 3 and wanted in end]
    return [ends[end] for end in (inside[:3] or close)]
