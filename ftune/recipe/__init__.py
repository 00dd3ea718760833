"""Recipes: YAML text in, a frozen `Recipe` out, or every problem at once with its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from ftune import plugin
from ftune.errors import Problem, RecipeError
from ftune.findings import unknown_finding
from ftune.options import Options
from ftune.recipe import mapping
from ftune.recipe import overrides as overriding
from ftune.recipe import problems as wording
from ftune.recipe import source as sources
from ftune.recipe.schedules import SCHEDULES
from ftune.recipe.schema import PLUGIN_SECTIONS, SECTIONS, Chosen, Recipe, Training
from ftune.recipe.schema import Source as Item
from ftune.recipe.source import KeyPath, Source, written

_REQUIRED: dict[KeyPath, str] = {
    ("model", "model_name_or_path"): "HuggingFaceTB/SmolLM2-135M-Instruct",
    ("data", "train"): "data/train.jsonl",
    ("training", "output_dir"): "runs/my-run",
    ("training", "lr_scheduler_kwargs", "num_decay_steps"): "100",
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
    return validate(read(recipe, overrides), overrides)


def read(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Source:
    """Return what is written, with `--set` in it; raises RecipeError where that is not readable."""
    source = mapping.source_of(recipe) if isinstance(recipe, Mapping) else sources.read(Path(recipe))
    return overriding.apply(source, overrides)


def validate(source: Source, overrides: Sequence[str] = ()) -> Loaded:
    """Return the recipe that a source says; raises RecipeError with all that is wrong with its shape."""
    return Loaded(_validate(source), source, tuple(overrides))


def _validate(source: Source) -> Recipe:
    reader = _Validator(source)
    values = {name: reader.section(name) for name in SECTIONS}
    for name in source.data:
        if name not in SECTIONS:
            reader.problems.append(wording.unknown_section(source, name))
    optimizer = reader.optimizer()
    reader.known_format()
    reader.known_findings()
    schedule = reader.schedule()
    problems = [*reader.problems, *source.problems]
    if problems:
        raise RecipeError(*sorted(problems, key=lambda problem: order(problem, source)))
    values["training"] = values["training"].model_copy(update={"lr_scheduler_kwargs": schedule})
    return Recipe(**values, optimizer=optimizer)  # type: ignore[arg-type]


def order(problem: Problem, source: Source) -> tuple[bool, str, int, int]:
    """Return the key that sorts problems: the order of the file, then that of the arguments of --set."""
    place = problem.where
    if place is None:
        return (True, "", 0, 0)
    elsewhere = place.file != source.file
    return (elsewhere, place.file if elsewhere else "", place.line or 0, place.column or 0)


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
            if "method" in given and given["method"] is None:
                self.problems.append(wording.empty_value(self.source, (name, "method"), f"`{default}`"))
                return None
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
        near = wording.nearest(method, known) if isinstance(method, str) else []
        return Problem(
            "unknown-method",
            f"there is no {path[-2] if path[-1] == 'method' else path[-1]} {wording.shown(method)}",
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
        if not isinstance(method, str):
            return None
        return self.chosen(
            plugin.OPTIMIZERS, method, options if isinstance(options, dict) else {}, ("training", "optim_args")
        )

    def schedule(self) -> dict[str, Any]:
        """Read `lr_scheduler_kwargs` as the options of the schedule; only those that are given are handed on."""
        training = self.source.data.get("training")
        given = training.get("lr_scheduler_kwargs") if isinstance(training, dict) else None
        name = training.get("lr_scheduler_type", "linear") if isinstance(training, dict) else None
        model = SCHEDULES.get(name) if isinstance(name, str) else None
        if model is None or not isinstance(given, dict | None):
            return {}
        validated = self.model(model, given or {}, ("training", "lr_scheduler_kwargs"), str(name))
        return {} if validated is None else dict(validated.model_dump(exclude_unset=True))

    def known_format(self) -> None:
        data = self.source.data.get("data")
        name = data.get("format", "auto") if isinstance(data, dict) else "auto"
        if isinstance(name, str) and name != "auto" and name not in plugin.names(plugin.FORMATS):
            known = ("auto", *plugin.names(plugin.FORMATS))
            self.problems.append(self._unknown_method(plugin.FORMATS, name, ("data", "format"), known))

    def known_findings(self) -> None:
        data = self.source.data.get("data")
        ignored = data.get("audit_ignore") if isinstance(data, dict) else None
        for number, kind in enumerate(ignored if isinstance(ignored, list) else []):
            where = self.source.value(("data", "audit_ignore", number))
            if isinstance(kind, str) and (problem := unknown_finding(kind, where)) is not None:
                self.problems.append(problem)

    def model(self, model: type[Options] | None, given: dict[str, Any], path: KeyPath, owner: str) -> Any:
        assert model is not None
        before = len(self.problems)
        known = {key: value for key, value in given.items() if key in model.model_fields}
        for key, value in given.items():
            if key not in known:
                self.problems.append(wording.unknown_key(self.source, (*path, key), model.model_fields, owner))
            elif value is None and (default := _default_for_null(model, key)) is not ...:
                del known[key]
                if default != {}:
                    self.problems.append(wording.empty_value(self.source, (*path, key), default))
        try:
            validated = model(**known)
        except ValidationError as error:
            self._collect(error, path)
            return None
        return validated if len(self.problems) == before else None

    def _collect(self, error: ValidationError, path: KeyPath) -> None:
        branches: dict[KeyPath, list[dict[str, Any]]] = {}
        told: list[KeyPath] = []
        for item in error.errors(include_url=False):
            key = self._shown_path(path, item["loc"])
            if item["type"] == "missing" and len(item["loc"]) == 1:
                if not self._is_empty(key):
                    self.problems.append(wording.missing_key(self.source, key, _REQUIRED.get(key, "...")))
            elif item["type"] == "extra_forbidden":  # `Item` is the only mapping of its own inside a section
                told.append(key)
                self.problems.append(wording.unknown_key(self.source, key, Item.model_fields, str(item["loc"][0])))
            elif item["type"] == "missing" and isinstance(item["loc"][-1], str):
                told.append(key)
                self.problems.append(wording.missing_key(self.source, (*key, item["loc"][-1]), "FILE"))
            else:
                branches.setdefault(key, []).append(dict(item))
        for key, items in branches.items():
            # A list with one bad item is also "not text": only the item is worth telling.
            if not any(other != key and other[: len(key)] == key for other in (*branches, *told)):
                self.problems.append(wording.bad_value(self.source, key, items))

    def _is_empty(self, path: KeyPath) -> bool:
        """Return whether a key is there without a value, which has been told already."""
        return path in self.source.marks

    def _shown_path(self, path: KeyPath, location: tuple[str | int, ...]) -> KeyPath:
        """Cut what pydantic appends for a branch of a union: keep what stands in the recipe."""
        full: KeyPath = (*path, location[0])
        for part in location[1:]:
            if (*full, part) in self.source.marks:
                full = (*full, part)
        return full


def _default_for_null(model: type[Options], key: str) -> Any:
    """Return the default of a key for which null means nothing; `...` where null is one of its values.

    An empty mapping is what its heading alone says, with every line below it commented out.
    """
    field = model.model_fields[key]
    if type(None) in get_args(field.annotation):
        return ...
    if field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    return default if default == {} else f"`{written(default)}`"
