"""What a name in a recipe stands for: a file, a folder, an installed package, or something on a hub."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from ftune.errors import Place, Problem, RecipeError

PACKAGE = "package:"
"""Before the name of an installed Python package that holds a model."""
DATA_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def locate(name: str, beside: Path) -> Path | None:
    """Return the local file or directory of that name: from where we are, else from the recipe's own folder."""
    try:
        path = Path(name).expanduser()
        for candidate in (path,) if path.is_absolute() else (Path.cwd() / path, beside / path):
            if candidate.exists():
                return candidate.resolve()
    except (OSError, RuntimeError, ValueError):  # a name too long for a file, `~nobody`, a folder closed to us
        return None
    return None


def expanded(name: str | Path, place: Place | None = None) -> Path:
    """Return the path of that name, which need not be there; raises RecipeError where it can be none on this system."""
    try:
        path = Path(name).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except RuntimeError:
        user = Path(name).parts[0].removeprefix("~")
        why = f"there is no user `{user}`" if user else "this user has no home folder"
    except (OSError, ValueError) as error:
        why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    else:
        return path
    shown = str(name) if len(str(name)) <= 60 else f"{str(name)[:57]}..."
    problem = Problem("bad-path", f"`{shown}` cannot be a path", place, why=why, fix="name another one")
    raise RecipeError(problem)


def package_folder(name: str) -> Path | None:
    """Return the folder of `package:some_name`; None where no such package is installed."""
    package = name.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def model_folder(name: str) -> Path | None:
    """Return the folder of a local model, or of one inside a Python package; None for a hub name."""
    if name.startswith(PACKAGE):
        return package_folder(name)
    path = locate(name, Path.cwd())
    return path if path is not None and path.is_dir() else None


def stored_folder(name: str, beside: Path, *, revision: str | None = None) -> Path | None:
    """Return the folder of a model as far as it is on this disk, in a hub's cache too; None where it is not."""
    if name.startswith(PACKAGE):
        return package_folder(name)
    return locate(name, beside) or _cached_folder(name, revision)


def config_in(folder: Path) -> dict[str, Any] | None:
    """Return the config.json of a folder; None where it cannot be read, which whoever loads it will explain."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _cached_folder(name: str, revision: str | None) -> Path | None:
    """Return the snapshot of a hub model as huggingface_hub lays it out, whose import would take too long here."""
    if not _HUB_NAME.fullmatch(name):
        return None
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        folder = cache.expanduser() / f"models--{name.replace('/', '--')}"
        reference = folder / "refs" / str(revision or "main")
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
        return folder / "snapshots" / str(commit) if commit else None
    return None


def meant_as_data_file(name: str) -> bool:
    """Return whether a name that is not there was meant as a file rather than as `owner/name` on a hub."""
    if _written_as_path(name) or name.lower().endswith((*DATA_ENDINGS, ".gz")):
        return True
    # A hub name without an owner has no dot: `rows.jsnl` is a file with a slip in its ending.
    return "/" not in name and "." in name


def meant_as_model_folder(name: str) -> bool:
    """Return whether a name that is not there was meant as a folder rather than as `owner/name` on a hub."""
    if _written_as_path(name) or not _HUB_NAME.fullmatch(name):
        return True
    try:
        return "/" in name and Path(name).parent.is_dir()
    except (OSError, ValueError):
        return True


def _written_as_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1 or Path(name).is_absolute()
