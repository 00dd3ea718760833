"""The house rules: layers, sizes, styles, names, and what a command may import."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_MODULES = sorted((_ROOT / "ftune").rglob("*.py"))
_LONGEST_MODULE, _LONGEST_FUNCTION = 400, 60
_HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "numpy"}
_COMMANDS = [
    *("init", "check", "plan", "preview", "train", "launch", "resume", "chat", "merge", "export", "rebuild"),
    *("report", "explain", "schema", "doctor"),
]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    made = {**os.environ, **environment}
    return subprocess.run(
        [str(part) for part in command], cwd=_ROOT, env=made, capture_output=True, text=True, check=False
    )


def tool(name: str) -> str:
    """Return the path of a program installed beside this Python, or on the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def folders(*names: str) -> list[str]:
    return [name for name in names if (_ROOT / name).is_dir()]


@pytest.mark.parametrize(
    "command",
    [
        ("lint-imports",),
        ("ruff", "check"),
        ("ruff", "format", "--check"),
        ("mypy",),
    ],
    ids=" ".join,
)
def test_tools_have_nothing_to_say(command: tuple[str, ...]) -> None:
    program, *arguments = command
    more = folders("ftune", "tests", "benchmarks") if program == "ruff" else []
    done = run(tool(program), *arguments, *more)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_spelling() -> None:
    texts = [path for path in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md") if (_ROOT / path).is_file()]
    # Tests misspell on purpose.
    done = run(tool("codespell"), *folders("ftune", "benchmarks", "docs"), *texts)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", _MODULES, ids=[str(path.relative_to(_ROOT)) for path in _MODULES])
def test_modules_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= _LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno + 1 <= _LONGEST_FUNCTION, node.name
    assert text.isascii(), "code is ASCII"
    assert text.strip() == "" or ast.get_docstring(ast.parse(text)), "a module says what it is"


def imported(*arguments: str) -> set[str]:
    """Return the top-level packages that a command imports."""
    done = run(sys.executable, "-X", "importtime", "-m", "ftune", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}


def test_help_imports_nothing_heavy() -> None:
    assert imported("--help") & {*_HEAVY, "pydantic", "yaml", "rich"} == set()


def test_check_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: {model_name_or_path: m}\ndata: {train: some/data}\ntraining: {output_dir: o}\n", encoding="utf-8"
    )
    assert imported("check", str(tmp_path / "recipe.yaml")) & _HEAVY == set()


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_of_every_command_shows_an_example(name: str) -> None:
    done = run(sys.executable, "-m", "ftune", name, "--help")
    assert done.returncode == 0
    assert f"Example: ftune {name}" in done.stdout


def test_every_command_is_in_the_help() -> None:
    listed = re.findall(r"^  (\w+) ", run(sys.executable, "-m", "ftune", "--help").stdout, re.MULTILINE)
    assert sorted(listed) == sorted(_COMMANDS)


def texts() -> Iterator[Path]:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines()
    for name in listed:
        path = _ROOT / name
        if path.is_file() and path.stat().st_size < 2**20:
            yield path


def test_no_file_names_a_place_on_this_machine() -> None:
    """Built from parts, so that this file does not find itself."""
    home = str(Path.home())
    banned = ["/" + "work/", str(_ROOT), *([home + "/"] if len(home) > 1 else [])]
    found = []
    for path in texts():
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [f"{path.relative_to(_ROOT)}: {word}" for word in banned if word in text]
    assert found == []
