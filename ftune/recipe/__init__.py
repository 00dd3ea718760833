"""Recipes: YAML text in, a frozen `Recipe` out, or every problem at once with its place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ftune import plugin
from ftune.errors import Problem, RecipeError
from ftune.options import Options
from ftune.recipe import overrides as overriding
from ftune.recipe import problems as wording
from ftune.recipe import source as sources
from ftune.recipe.schema import PLUGIN_SECTIONS, SECTIONS, Chosen, Recipe, Training
from ftune.recipe.source import KeyPath, Source

_REQUIRED = {
    ("model", "model_name_or_path"): "HuggingFaceTB/SmolLM2-135M-Instruct",
    ("data", "train"): "data/train.jsonl",
    ("training", "output_dir"): "runs/my-run",
}


@dataclass(frozen=True)
class Loaded:
    """A recipe and the text it came from."""

    recipe: Recipe
    source: Source
    overrides: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """The recipe's own folder, from which relative data paths may count."""
        return Path(self.source.file).resolve().parent


def load(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe file (or a mapping of the same shape); raises RecipeError with all that is wrong with its shape."""
    if isinstance(recipe, Mapping):
        source = _from_mapping(recipe)
    else:
        source = sources.read(Path(recipe))
    source = overriding.apply(source, overrides)
    return Loaded(_validate(source), source, tuple(overrides))


def _from_mapping(data: Mapping[str, Any]) -> Source:
    import yaml

    return sources.parse("recipe", yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, default_flow_style=False))


def _validate(source: Source) -> Recipe:
    reader = _Validator(source)
    values = {name: reader.section(name) for name in SECTIONS}
    for name in source.data:
        if name not in SECTIONS:
            reader.problems.append(wording.unknown_section(source, name))
    optimizer = reader.optimizer()
    reader.known_format()
    if reader.problems:
        raise RecipeError(*sorted(reader.problems, key=lambda problem: _order(problem, source)))
    return Recipe(**values, optimizer=optimizer)  # type: ignore[arg-type]


def _order(problem: Problem, source: Source) -> tuple[bool, int, int]:
    """The order of the file, then the arguments of --set."""
    place = problem.where
    if place is None:
        return (True, 0, 0)
    return (place.file != source.file, place.line or 0, place.column or 0)


class _Validator:
    """Reads section by section and collects every problem."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[Problem] = []

    def section(self, name: str) -> Any:
        given = self.source.data.get(name)
        if given is None:
            given = {}
        if not isinstance(given, dict):
            what = f"`{name}` is a section: its keys go below it"
            self.problems.append(Problem("bad-value", what, self.source.value((name,)), fix=f"`ftune explain {name}`"))
            return None
        if name in PLUGIN_SECTIONS:
            package, default = PLUGIN_SECTIONS[name]
            options = {key: value for key, value in given.items() if key != "method"}
            return self.chosen(package, given.get("method", default), options, (name,))
        return self.model(SECTIONS[name], given, (name,), name)

    def chosen(self, package: str, method: Any, options: dict[str, Any], path: KeyPath) -> Chosen | None:
        known = plugin.names(package)
        if not isinstance(method, str) or method not in known:
            at: KeyPath = ("training", "optim") if package == plugin.OPTIMIZERS else (*path, "method")
            self.problems.append(self._unknown_method(package, method, at, known))
            return None
        validated = self.model(plugin.get(package, method).Options, options, path, method)
        return None if validated is None else Chosen(method, validated)

    def _unknown_method(self, package: str, method: Any, path: KeyPath, known: tuple[str, ...]) -> Problem:
        near = difflib.get_close_matches(str(method), known, n=1)
        return Problem(
            "unknown-method",
            f"there is no {path[-2] if path[-1] == 'method' else path[-1]} `{method}`",
            self.source.value(path),
            f"did you mean `{near[0]}`?" if near else "",
            fix="known: " + ", ".join(known),
        )

    def optimizer(self) -> Chosen | None:
        """Read `training.optim` and its options, also where the rest of `training` is wrong."""
        training = self.source.data.get("training")
        if not isinstance(training, dict):
            return None
        method = training.get("optim", Training.model_fields["optim"].default)
        options = training.get("optim_args")
        return self.chosen(
            plugin.OPTIMIZERS, method, options if isinstance(options, dict) else {}, ("training", "optim_args")
        )

    def known_format(self) -> None:
        data = self.source.data.get("data")
        name = data.get("format", "auto") if isinstance(data, dict) else "auto"
        if name != "auto" and name not in plugin.names(plugin.FORMATS):
            known = ("auto", *plugin.names(plugin.FORMATS))
            self.problems.append(self._unknown_method(plugin.FORMATS, name, ("data", "format"), known))

    def model(self, model: type[Options] | None, given: dict[str, Any], path: KeyPath, owner: str) -> Any:
        assert model is not None
        before = len(self.problems)
        known = {key: value for key, value in given.items() if key in model.model_fields}
        for key in given:
            if key not in known:
                self.problems.append(wording.unknown_key(self.source, (*path, key), model.model_fields, owner))
        try:
            validated = model(**known)
        except ValidationError as error:
            self._collect(error, path)
            return None
        return validated if len(self.problems) == before else None

    def _collect(self, error: ValidationError, path: KeyPath) -> None:
        branches: dict[KeyPath, list[dict[str, Any]]] = {}
        for item in error.errors(include_url=False):
            key = self._shown_path(path, item["loc"])
            if item["type"] == "missing":
                example = _REQUIRED.get((str(key[0]), str(key[-1])), "...")
                self.problems.append(wording.missing_key(self.source, str(key[0]), str(key[-1]), example))
            else:
                branches.setdefault(key, []).append(dict(item))
        for key, items in branches.items():
            self.problems.append(wording.bad_value(self.source, key, items))

    def _shown_path(self, path: KeyPath, location: tuple[str | int, ...]) -> KeyPath:
        """Cut what pydantic appends for a branch of a union: keep what stands in the recipe."""
        full: KeyPath = (*path, location[0])
        for part in location[1:]:
            if (*full, part) not in self.source.marks:
                break
            full = (*full, part)
        return full
