"""RunSpec: everything decided, each decision with its reason; JSON round-trips, no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ftune.recipe.schema import Recipe


@dataclass(frozen=True)
class Decision:
    """A value that was not fixed by the recipe's own words, and why it is what it is."""

    key: str
    value: Any
    why: str
    by: Literal["recipe", "default", "ftune"] = "ftune"


@dataclass(frozen=True)
class RunSpec:
    """What will run.

    `recipe` holds no `auto` but what the run itself settles; `training_arguments` are Hugging Face's spellings of it.
    """

    recipe: Recipe
    training_arguments: dict[str, Any]
    decisions: tuple[Decision, ...]
    recipe_text: str
    overrides: tuple[str, ...]
    data_fingerprint: dict[str, str]
    """SHA-256 of each local data file, by its path as the recipe gives it."""
    versions: dict[str, str]
    device_type: Literal["cpu", "cuda"]
    ftune_version: str

    def to_json(self) -> str:
        """Return the text of `run.json`."""
        values = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("recipe", "decisions")
        }
        values["recipe"] = self.recipe.as_dict()
        values["decisions"] = [asdict(decision) for decision in self.decisions]
        values["seed"] = self.recipe.training.seed
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> RunSpec:
        """Return the RunSpec of a `run.json`; raises ValueError, KeyError or TypeError where it is none."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        values.pop("seed", None)
        values["recipe"] = Recipe.from_dict(values["recipe"])
        values["decisions"] = tuple(Decision(**decision) for decision in values["decisions"])
        values["overrides"] = tuple(values["overrides"])
        return RunSpec(**values)
