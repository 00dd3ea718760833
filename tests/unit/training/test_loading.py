"""What a run says of its rows before the first step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ftune.data.prepare import prepare
from ftune.models.load import load_tokenizer
from ftune.recipe import load
from ftune.recipe.schema import Model
from ftune.training.loading import tell


class Heard:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def told(model: Path, folder: Path, sizes: list[int], **settings: Any) -> str:
    rows = folder / "rows.jsonl"
    turns = [[{"role": "user", "content": "Go"}, {"role": "assistant", "content": "a" * size}] for size in sizes]
    rows.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    training = {"output_dir": str(folder / "run"), "per_device_train_batch_size": 2, **settings.pop("training", {})}
    data = {"train": str(rows), "max_length": 250, "num_proc": 1, "audit_ignore": ["duplicate"], **settings}
    recipe = load({"model": {"model_name_or_path": str(model)}, "data": data, "training": training}).recipe
    tokenizer = load_tokenizer(Model(model_name_or_path=str(model)))
    heard = Heard()
    tell(prepare(recipe.data, tokenizer=tokenizer, seed=0, cache=None), recipe, heard)  # type: ignore[arg-type]
    return "\n".join(heard.lines)


def test_padding_is_told_with_the_setting_that_leaves_least(tiny_model: Path, tmp_path: Path) -> None:
    sizes = [3, 180] * 40
    said = told(tiny_model, tmp_path, sizes)
    share = re.search(r"train: ([\d.]+)% of the places in a batch are padding; (\S+: true) would leave ([\d.]+)%", said)
    assert share is not None, said
    # Half of the pairs are uneven ones.
    assert 15 < float(share[1]) < 45
    assert float(share[3]) < 3
    grouped = told(tiny_model, tmp_path, sizes, training={"group_by_length": True})
    assert re.search(r"train: 0\.\d% of the places in a batch are padding$", grouped, re.MULTILINE), grouped


@pytest.mark.parametrize("sizes", [[30] * 20, [3]])
def test_nothing_is_advised_where_little_is_padded(sizes: list[int], tiny_model: Path, tmp_path: Path) -> None:
    assert "train: 0.0% of the places in a batch are padding\n" in told(tiny_model, tmp_path, sizes) + "\n"
