"""The shipped DeepSpeed files are what the code prints, and what a stage means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftune.resolve import deepspeed

FOLDER = Path(__file__).parents[2] / "configs" / "deepspeed"


@pytest.mark.parametrize("name", deepspeed.STANDARD)
def test_shipped_file_is_printed_by_the_code(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == deepspeed.text(name)


def test_no_other_file_ships() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(deepspeed.STANDARD)


def test_what_the_stages_say() -> None:
    stages = {name: json.loads(deepspeed.text(name))["zero_optimization"] for name in deepspeed.STANDARD}
    assert [stages[name]["stage"] for name in ("zero1", "zero2", "zero3", "zero3_offload")] == [1, 2, 3, 3]
    assert stages["zero3_offload"]["offload_param"]["device"] == "cpu"
    assert stages["zero3_offload"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_param" not in stages["zero3"]
    assert stages["zero3"]["stage3_gather_16bit_weights_on_model_save"] is True
