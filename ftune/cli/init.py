"""`ftune init`: copy a shipped recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which recipe; --list shows them.")] = "quickstart",
    output: Annotated[Path, typer.Option(metavar="FILE", help="The file to write; must be new.")] = Path("recipe.yaml"),
    show: Annotated[bool, typer.Option("--list", help="Print the shipped recipes and leave.")] = False,
) -> None:
    """Copy a shipped recipe to start from, with the data it needs.

    Example: ftune init quickstart --output my-recipe.yaml
    """
    from ftune import shipped

    if show:
        names = shipped.recipe_names()
        width = max(map(len, names), default=0)
        for each in names:
            typer.echo(f"{each:<{width}}  {shipped.summary(each)}".rstrip())
        return
    from ftune.errors import Problem, RecipeError

    try:
        copied = copy_recipe(name, output)
    except OSError as error:
        what, fix = f"cannot write `{output}`", "name another file with --output"
        raise RecipeError(Problem(rule="output-unwritable", what=what, why=str(error), fix=fix)) from None
    for written in copied:
        typer.echo(f"wrote {written}")
    shown = f'"{output}"' if " " in str(output) else str(output)
    typer.echo(f"next: ftune train {shown}")


def copy_recipe(name: str, output: Path) -> list[Path]:
    """Write a recipe and its files beside it; nothing at all where one of them is in the way."""
    from ftune import shipped
    from ftune.errors import Problem, RecipeError
    from ftune.rundir import write_text

    _check_name(name, shipped.recipe_names())
    if output.is_dir() or output.exists():
        what = f"`{output}` exists already"
        raise RecipeError(Problem(rule="output-exists", what=what, fix="name another file with --output"))
    source = shipped.recipe_path(name)
    copies = {path: output.parent / path.relative_to(source.parent) for path in _companions(source)}
    for path, target in copies.items():
        if target.exists() and not (target.is_file() and target.read_bytes() == path.read_bytes()):
            what = f"`{target}` exists already, and is not the file that comes with `{name}`"
            raise RecipeError(Problem(rule="output-exists", what=what, fix="write the recipe into another folder"))
    written = []
    for path, target in copies.items():
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, path.read_text(encoding="utf-8"))
            written.append(target)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, source.read_text(encoding="utf-8"))
    return [output, *written]


def _check_name(name: str, names: list[str]) -> None:
    import difflib

    from ftune.errors import Problem, RecipeError

    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    fix = (f"did you mean `{near[0]}`? " if near else "") + "there are: " + ", ".join(names)
    raise RecipeError(Problem(rule="unknown-recipe", what=f"no recipe `{name}` comes with ftune", fix=fix))


def _companions(source: Path) -> list[Path]:
    """Return the shipped files that a recipe names, and the licences that go with them."""
    from ftune.recipe.source import read

    data = read(source).data.get("data") or {}
    found: dict[Path, None] = {}
    for key in ("train", "eval", "chat_template"):
        named = data.get(key)
        for one in named if isinstance(named, list) else [named]:
            if isinstance(one, str) and (source.parent / one).is_file():
                path = source.parent / one
                found[path] = None
                found.update(dict.fromkeys(sorted(path.parent.glob("*LICENSE*"))))
    return list(found)
