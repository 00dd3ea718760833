"""Files that come with ftune: recipes and their data, in the wheel as in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def recipes() -> Path:
    """Return the folder of shipped recipes."""
    packed = _PACKAGE / "shipped" / "recipes"
    return packed if packed.is_dir() else _PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of all shipped recipes."""
    root = recipes()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return the file of a shipped recipe."""
    return recipes() / f"{name}.yaml"


def summary(name: str) -> str:
    """Return the first comment line of a shipped recipe: what it is for."""
    for line in recipe_path(name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and line.strip("# "):
            return line.lstrip("# ").rstrip()
        if line.strip() and not line.startswith("#"):
            break
    return ""
