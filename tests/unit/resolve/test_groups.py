"""Groups of inputs that do not fit are refused while the model's numbers are all that is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftune.errors import Problem
from ftune.machine import Machine
from ftune.resolve import examine, groups

LLAMA = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 160}


def examined(folder: Path, config: dict[str, Any], tuning: dict[str, Any], **model: Any) -> list[Problem]:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "rows.jsonl").write_text("{}\n")
    recipe = {
        "model": {"model_name_or_path": str(folder / "model"), **model},
        "data": {"train": str(folder / "rows.jsonl")},
        "tuning": tuning,
        "training": {"output_dir": str(folder / "run")},
    }
    return [problem for problem in examine(recipe, (), Machine())[1] if problem.severity == "error"]


def test_each_width_is_looked_at(tmp_path: Path) -> None:
    for size, width in ((96, 64), (64, 96), (40, 64), (32, None), (5, 64)):
        found = examined(tmp_path, LLAMA, {"method": "qalora", "group_size": size})
        assert [problem.rule for problem in found] == (["group-size"] if width else [])
        if width:
            assert f"has {width} inputs, which are no whole number of groups of {size}" in found[0].what
            assert found[0].fix == "choose a group_size that divides it: 8, 16, 32"
            assert found[0].where is not None
            assert found[0].where.text == f"  group_size: {size}"


def test_the_default_is_looked_at_too(tmp_path: Path) -> None:
    (problem,) = examined(tmp_path, {**LLAMA, "intermediate_size": 176}, {"method": "qalora"})
    assert "has 176 inputs" in problem.what


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mixtral"},
        {"model_type": None},
        {"quantization_config": {"quant_method": "gptq"}},
        {"hidden_size": "wide", "intermediate_size": None, "head_dim": None},
    ],
)
def test_what_is_not_known_is_left_to_loading(changes: dict[str, Any], tmp_path: Path) -> None:
    assert examined(tmp_path, {**LLAMA, **changes}, {"method": "qalora", "group_size": 96}) == []


def test_codes_without_settings_have_groups_of_their_own(tmp_path: Path) -> None:
    """As the hqq package writes them."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "model").mkdir()
    save_file({"model.layers.0.mlp.up_proj.W_q": torch.zeros(2)}, tmp_path / "model" / "model.safetensors")
    assert examined(tmp_path, LLAMA, {"method": "qalora", "group_size": 96}) == []


def test_a_group_of_something_else_is_none(tmp_path: Path) -> None:
    assert examined(tmp_path, LLAMA, {"method": "hift", "group_size": 96}) == []


@pytest.mark.parametrize("revision", [None, "main", "0123abc"])
def test_a_model_of_the_hub_that_is_here(revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against huggingface_hub's own idea of where that is."""
    from huggingface_hub import constants, try_to_load_from_cache

    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abc")
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    theirs = try_to_load_from_cache("some/model", "config.json", cache_dir=tmp_path / "hub", revision=revision)
    assert theirs == str(snapshot / "config.json")
    tuning = {"method": "qalora", "group_size": 96}
    (problem,) = examined(tmp_path, LLAMA, tuning, model_name_or_path="some/model", revision=revision)
    assert "a layer of `some/model` has 64 inputs" in problem.what


@pytest.mark.parametrize("kind", sorted(groups.PLAIN))
def test_widths_are_those_of_the_modules(kind: str) -> None:
    """Of a model of that kind, made without numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftune.quantized.model import linear_layers

    shape = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}
    for more in ({}, {"head_dim": 48}):
        config = AutoConfig.for_model(kind, **shape, **more, num_hidden_layers=2, vocab_size=64, pad_token_id=0)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        read = {layer.in_features for layer in linear_layers(model).values()}
        found = set(groups.inputs_of(config.to_dict()))
        assert found <= read
        assert {96, 160} <= found
        assert not more or found == read


def test_no_torch_is_loaded_for_it(tmp_path: Path) -> None:
    examined(tmp_path, LLAMA, {"method": "qalora"})
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{model_name_or_path: {tmp_path / 'model'}}}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\n"
        f"tuning: {{method: qalora, group_size: 96}}\ntraining: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    command = [sys.executable, "-X", "importtime", "-m", "ftune", "check", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "[group-size]" in done.stderr
    assert f"{tmp_path / 'recipe.yaml'}:3:" in done.stderr
    heavy = {"torch", "transformers", "peft", "huggingface_hub", "safetensors"}
    assert not heavy & {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
