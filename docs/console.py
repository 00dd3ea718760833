"""The console blocks of these pages: what the real program prints, for cog.

Every block runs in an empty folder with only the files it is given, so that it comes out the same on any machine.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import cog

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """\
model:
  model_name_or_path: my-model
data:
  train: train.jsonl
training:
  output_dir: runs/my-run
"""
ROW = '{"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello!"}]}\n'


def show(*commands: str, status: bool = False, **changed: str) -> None:
    """Print a console block of `ftune` commands; `status` also shows the exit code.

    The folder holds a recipe, rows and a model's directory; `recipe`, `rows` replace the text of the first two.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "my-model").mkdir()
        (home / "recipe.yaml").write_text(changed.get("recipe", RECIPE), encoding="utf-8")
        (home / "train.jsonl").write_text(changed.get("rows", ROW), encoding="utf-8")
        lines = []
        for command in commands:
            answer, code = _run(command, home)
            assert code, f"{command}: what ftune chooses differs from machine to machine, so only errors belong here"
            lines += [f"$ {command}", answer.replace(folder, "/home/you").rstrip()]
            if status:
                lines += ["$ echo $?", str(code)]
    cog.outl("\n".join(["```console", *[line for line in lines if line], "```"]))


def _run(command: str, home: Path) -> tuple[str, int]:
    program, *arguments = shlex.split(command)
    assert program == "ftune", command
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ftune", *arguments],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout, done.returncode


def commands() -> None:
    """Print the table of all commands: the first line of each one's help."""
    import typer

    from ftune.cli import app

    cog.outl("| command | does |\n|---|---|")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        first = (command.help or "").strip().split("\n\n")[0]
        cog.outl(f"| `ftune {name}` | {' '.join(first.split()).rstrip('.')} |")
