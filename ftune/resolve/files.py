"""Which files a recipe means, and whether they are there: known before any heavy library is loaded."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ftune.errors import Problem
from ftune.recipe import Loaded
from ftune.recipe.source import KeyPath

DATA_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz")


def locate(name: str, beside: Path) -> Path | None:
    """Return the local file or directory of that name: from where we are, else from the recipe's own folder."""
    path = Path(name).expanduser()
    for candidate in (path,) if path.is_absolute() else (Path.cwd() / path, beside / path):
        if candidate.exists():
            return candidate.resolve()
    return None


def looks_local(name: str) -> bool:
    """Return whether a name that is not there was meant as a file rather than as `owner/name` on a hub."""
    return name.startswith(("/", "./", "../", "~")) or name.endswith(("/", *DATA_ENDINGS)) or name.count("/") > 1


def sources(value: str | list[str] | float | None) -> list[str]:
    """Return the names in `data.train` or `data.eval`; a fraction names none."""
    if value is None or isinstance(value, (int, float)):
        return []
    return [value] if isinstance(value, str) else list(value)


def data_problems(loaded: Loaded) -> list[Problem]:
    """Return a problem for every data file that is not there, or is empty."""
    return [problem for key in ("train", "eval") for problem in _key_problems(loaded, key)]


def fingerprint(names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each local file among the names (of a directory: of each file in it), by name."""
    found = {}
    for name in names:
        path = Path(name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file)] = _sha256(file)
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _key_problems(loaded: Loaded, key: str) -> Iterator[Problem]:
    value = getattr(loaded.recipe.data, key)
    for index, name in enumerate(sources(value)):
        path: KeyPath = ("data", key, index) if isinstance(value, list) else ("data", key)
        place = loaded.source.value(path)
        found = locate(name, loaded.directory)
        if found is None and looks_local(name):
            yield Problem("data-file", f"there is no file {name}", place, fix=_near(name, loaded.directory))
        elif found is not None and found.is_file() and found.stat().st_size == 0:
            yield Problem("data-empty", f"{name} is empty", place, why="it has no bytes", fix="put rows into it")
        elif found is not None and found.is_dir() and not any(found.iterdir()):
            yield Problem("data-empty", f"the directory {name} is empty", place, fix="put data files into it")


def _near(name: str, beside: Path) -> str:
    path = Path(name).expanduser()
    for folder in (path.parent, beside / path.parent):
        if folder.is_dir():
            names = [entry.name for entry in folder.iterdir()]
            near = difflib.get_close_matches(path.name, names, n=1)
            if near:
                return f"did you mean {path.parent / near[0]}?"
    return f"relative paths count from here ({Path.cwd()}), then from the recipe's folder ({beside})"
