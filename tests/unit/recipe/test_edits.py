"""Other values in a recipe's text: what is not changed stays letter for letter."""

from __future__ import annotations

import difflib
from typing import Any

import pytest

from ftune.errors import RecipeError
from ftune.recipe import overrides, source
from ftune.recipe.edits import REMOVED, edited

_TEXT = """\
# A recipe of mine, with remarks.

model:
  model_name_or_path: "my model"   # quoted
  dtype: auto
data: {train: [a.jsonl, 'b, c.jsonl'], max_length: 2048}  # on one line

training:
    output_dir: runs/x
    optim_args:
        betas: [0.9, 0.95]   # Adam's
        eps: 1e-6
    learning_rate: 2e-4 # peak
    per_device_train_batch_size: 16    # rows
    # gradient_checkpointing: true
tuning:
  # nothing yet
objective:
  method: sft
# the end
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("training.learning_rate", 1e-5, ["    learning_rate: 1.0e-05 # peak"]),
        ("training.per_device_train_batch_size", 2, ["    per_device_train_batch_size: 2    # rows"]),
        ("training.gradient_checkpointing", True, ["    gradient_checkpointing: true"]),
        ("training.optim_args.eps", 1e-8, ["        eps: 1.0e-08"]),
        ("training.optim_args.accumulate", "forward", ["        accumulate: forward"]),
        ("training.optim_args", {"eps": 1e-6}, []),
        ("training.optim_args", {"betas": [0.5, 0.9], "eps": 1e-6}, ["        betas: [0.5, 0.9]   # Adam's"]),
        ("model.dtype", "bfloat16", ["  dtype: bfloat16"]),
        ("model.model_name_or_path", "no", ["  model_name_or_path: 'no'   # quoted"]),
        ("model.revision", "123", ['  revision: "123"']),
        ("data.max_length", 512, ["data: {train: [a.jsonl, 'b, c.jsonl'], max_length: 512}  # on one line"]),
        (
            "data.eval",
            "e, f.jsonl",
            ["data: {train: [a.jsonl, 'b, c.jsonl'], max_length: 2048, eval: 'e, f.jsonl'}  # on one line"],
        ),
        ("data.max_length", REMOVED, ["data: {train: [a.jsonl, 'b, c.jsonl']}  # on one line"]),
        ("data.train", "x", ["data: {train: x, max_length: 2048}  # on one line"]),
        ("tuning", {"method": "qlora", "r": 8}, ["tuning: {method: qlora, r: 8}"]),
        ("tuning.method", "lora", ["  method: lora"]),
        ("model.dtype", REMOVED, []),
        ("distributed.engine", "ddp", ["distributed:", "  engine: ddp"]),
    ],
)
def test_only_what_is_changed_changes(key: str, value: Any, written: list[str], newline: str) -> None:
    text = _TEXT.replace("\n", newline)
    after = edited("recipe.yaml", text, {key: value})
    # The oracle is the way in which `--set` changes data, which knows nothing of text.
    data = source.parse("", after).data
    if value is REMOVED:
        section, name = key.split(".")
        assert name not in data[section]
    elif "." in key:
        expected = overrides.apply(source.parse("", text), [f"{key}={_flow(value)}"]).data
        assert {name: found for name, found in data.items() if found} == {
            name: found for name, found in expected.items() if found
        }
    else:
        assert data[key] == value
    new = [line[2:] for line in difflib.ndiff(text.split(newline), after.split(newline)) if line.startswith("+ ")]
    assert new == written
    assert newline == "\n" or "\n" not in after.replace("\r\n", "")


def _flow(value: Any) -> str:
    import json

    return json.dumps(value)


def test_remarks_are_all_there() -> None:
    values = {
        "training.optim": "lomo",
        "training.optim_args": {"accumulate": "buffer"},
        "tuning.method": "full",
        "data.max_length": 128,
        "distributed": {"engine": "ddp"},
    }
    after = edited("recipe.yaml", _TEXT, values)
    lost = "   # Adam's"  # which stood behind the value that went
    assert [line for line in _TEXT.splitlines() if line.strip().startswith("#")] == [
        line for line in after.splitlines() if line.strip().startswith("#")
    ]
    assert after.count("#") == _TEXT.count("#") - lost.count("#")
    assert source.parse("", after).data["training"]["optim_args"] == {"accumulate": "buffer"}


@pytest.mark.parametrize(
    "text",
    [
        "model: {model_name_or_path: m}",
        "model:\n  model_name_or_path: m",
        "{model: {model_name_or_path: m}}",
        "---\nmodel:\n  model_name_or_path: m\n...\n",
        "model:\n  model_name_or_path: m\ntraining:",
        "model:\n  model_name_or_path: m\ntraining: # remark",
        "model:\n  model_name_or_path: m\ntraining: null\n",
        "model:\n  model_name_or_path: m\ntraining: {}\n",
        "\ufeffmodel:\n  model_name_or_path: m\n",
        "",
    ],
)
def test_a_section_that_is_not_there(text: str) -> None:
    after = edited("recipe.yaml", text, {"training.seed": 7, "training.optim": "lomo"})
    expected = {name: value for name, value in source.parse("", text).data.items() if value}
    assert source.parse("", after).data == expected | {"training": {"seed": 7, "optim": "lomo"}}
    assert "remark" not in text or "# remark" in after


def test_aliases_are_refused_and_not_damaged() -> None:
    text = "model: {model_name_or_path: &x m}\ntraining: {output_dir: *x}\n"
    with pytest.raises(RecipeError, match="cannot be changed in this file's text"):
        edited("recipe.yaml", text, {"training.output_dir": "other"})
