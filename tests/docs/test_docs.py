"""The documentation says what the program says, about every key, rule and method."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ftune import plugin
from ftune.recipe.reference import all_keys
from ftune.rules import RULES

_ROOT = Path(__file__).parents[2]
_PAGES = [*sorted((_ROOT / "docs").glob("*.md")), _ROOT / "README.md"]


def page(name: str) -> str:
    return (_ROOT / "docs" / name).read_text(encoding="utf-8")


def test_generated_parts_are_up_to_date() -> None:
    command = [sys.executable, "-m", "cogapp", "--check", *map(str, _PAGES)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + "\nwrite them anew: cog -r docs/*.md README.md"


def test_every_key_rule_and_method_has_its_place() -> None:
    recipe, rules, methods = page("recipe.md"), page("rules.md"), page("methods.md")
    assert [key.name for key in all_keys() if f"| `{key.name}` |" not in recipe + methods] == []
    assert [rule.id for rule in RULES if f"### {rule.id}\n" not in rules] == []
    for kind in (plugin.OPTIMIZERS, plugin.TUNINGS, plugin.OBJECTIVES, plugin.FORMATS):
        assert [name for name in plugin.names(kind) if f"### {name}\n" not in methods] == []
