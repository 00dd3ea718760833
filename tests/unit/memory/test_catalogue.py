"""The catalogue against the published sizes, by building every model without memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftune.errors import RecipeError
from ftune.memory.catalogue import KnownModel, config_folder, find, known_models


@pytest.mark.parametrize("model", known_models(), ids=lambda model: model.name)
def test_parameters_are_the_published_ones(model: KnownModel) -> None:
    config = AutoConfig.from_pretrained(model.folder)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in built.parameters()) == model.parameters
    assert model.source
    said = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    assert said["architectures"] == [type(built).__name__]


def test_every_configuration_has_a_row_and_every_row_one() -> None:
    folders = {path.name for path in (Path(config_folder("gpt2")).parent).iterdir()}
    assert folders == {model.folder.name for model in known_models()}
    names = [name.lower() for model in known_models() for name in (model.name, *model.also)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("META-LLAMA/llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-70B"),
        ("gpt2", "openai-community/gpt2"),
        ("Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
    ],
)
def test_a_name(name: str, found: str) -> None:
    model = find(name)
    assert model is not None
    assert model.name == found
    assert (config_folder(name) / "config.json").is_file()


def test_a_directory_comes_before_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    assert config_folder("gpt2") == find("gpt2").folder  # type: ignore[union-attr]
    Path("gpt2/config.json").write_text("{}", encoding="utf-8")
    assert config_folder("gpt2") == Path("gpt2")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("meta-llama/Llama-3.1-8", "meta-llama/Llama-3.1-8B"),
        ("mistral-7b-v0.4", "mistralai/Mistral-7B-v0.1"),
        ("mixtral", "mistralai/Mixtral-8x7B-v0.1"),
        ("x" * 200, ""),
        ("./no/such/folder", ""),
    ],
)
def test_an_unknown_name(name: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        config_folder(name)
    (problem,) = caught.value.problems
    assert near in problem.fix
    assert "A directory with the model's config.json always works" in problem.fix
