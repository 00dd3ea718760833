"""`ftune check`, `explain` and `schema`, as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftune.recipe.reference import all_keys
from ftune.rules import RULES

Ftune = Callable[..., Any]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model:\n  model_name_or_path: some/model\ndata:\n  train: train.jsonl\ntraining:\n  output_dir: runs/x\n",
        encoding="utf-8",
    )
    return path


def test_a_good_recipe(ftune: Ftune, recipe: Path) -> None:
    done = ftune("check", recipe)
    assert (done.returncode, done.stderr) == (0, "")
    assert "can be trained here" in done.stdout
    assert "training.learning_rate" in done.stdout
    answer = json.loads(ftune("check", recipe, "--json").stdout)
    assert set(answer) == {"problems", "decisions"}
    assert answer["problems"] == []
    assert all(set(decision) == {"key", "value", "why", "by"} and decision["why"] for decision in answer["decisions"])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--set", "training.sede=1"], 2, "did you mean `seed`?"),
        (["--set", "training.bf16=true", "--set", "training.fp16=true"], 2, "one-precision"),
        (["--set", "model.model_name_or_path=package:no_such_package"], 3, "pip install"),
        (["--set", "data.train=trian.jsonl"], 4, "did you mean train.jsonl?"),
        (["--set", "data.train=trian.jsonl", "--set", "training.sede=1"], 2, "2 errors"),
        (["--set", "data.train=trian.jsonl", "--set", "model.model_name_or_path=package:no_such"], 3, "2 errors"),
    ],
)
def test_exit_codes_say_which_part_it_was(
    ftune: Ftune, recipe: Path, arguments: list[str], code: int, says: str
) -> None:
    done = ftune("check", recipe, *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    answer = ftune("check", recipe, "--json", *arguments)
    assert answer.returncode == code
    for problem in json.loads(answer.stdout)["problems"]:
        assert set(problem) == {"rule", "severity", "file", "line", "column", "message", "fix"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "training: 3\n",
        "tuning: {method: 5}\n",
        "data: {train: {a: 1}}\n",
        "training: {optim_args: 3}\n",
        "training: {seed: " + "9" * 5000 + "}\n",
        "a: [1\n",
        "- 1\n",
        "\u00e9\u4e2d: {\u00fc: 1}\n",
        '"a\\nb\\e[31m": 1\n',
    ],
)
def test_silly_recipes_are_told_without_a_traceback(ftune: Ftune, tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    done = ftune("check", path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert "error" in done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    json.loads(ftune("check", path, "--json", env={"PYTHONIOENCODING": "ascii"}).stdout)


def test_what_is_no_recipe_file(ftune: Ftune, tmp_path: Path) -> None:
    for name, says in ((tmp_path, "is a directory"), (tmp_path / "none.yaml", "there is no file")):
        done = ftune("check", name)
        assert done.returncode == 2
        assert says in done.stderr


def test_explain(ftune: Ftune) -> None:
    assert "one-precision" in ftune("explain").stdout
    for name in ("learning_rate", "training.learning_rate", "model", "optim", "sgd", "lora", "cosine", "one-precision"):
        done = ftune("explain", name)
        assert done.returncode == 0
        assert name.rpartition(".")[2] in done.stdout
    done = ftune("explain", "learning_rte")
    assert done.returncode == 2
    assert "did you mean learning_rate" in done.stderr


def test_everything_has_an_explanation() -> None:
    from ftune.rules.explanations import explain_name

    for name in {key.name for key in all_keys()} | {rule.id for rule in RULES}:
        assert explain_name(name)
    assert [key for key in all_keys() if not key.text] == []


def test_schema(ftune: Ftune) -> None:
    schema = json.loads(ftune("schema").stdout)
    assert schema["required"] == ["model", "data", "training"]
    for key in all_keys():
        section = schema["properties"][key.owner.split(" ")[0].split(".")[0]]
        for part in section.get("oneOf", [section]):
            assert part["additionalProperties"] is False
        if " " not in key.owner and "oneOf" not in section:
            assert section["properties"][key.name]["description"] == key.text


def test_check_imports_nothing_heavy(recipe: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys; sys.argv = ['ftune', 'check', sys.argv[1]]\n"
        "from ftune.cli import app\n"
        "app(standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'accelerate', 'bitsandbytes', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(recipe)], capture_output=True, text=True, check=True)
    assert answer.stdout.strip().splitlines()[-1] == "[]"
