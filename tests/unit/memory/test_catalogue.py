"""The catalogue against the published sizes, by building every model without memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftune.errors import RecipeError
from ftune.memory.ask import config_of_model
from ftune.memory.catalogue import KnownModel, find, folder_of, known_models
from ftune.recipe.schema import Model


@pytest.mark.parametrize("model", known_models(), ids=lambda model: model.name)
def test_parameters_are_the_noted_ones(model: KnownModel) -> None:
    config = AutoConfig.from_pretrained(model.folder)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in built.parameters()) == model.parameters
    assert model.source
    said = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    assert said["architectures"] == [type(built).__name__]


def test_every_configuration_has_a_row_and_every_row_one() -> None:
    folders = {path.name for path in (Path(folder_of("gpt2")).parent).iterdir()}
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
    assert (folder_of(name) / "config.json").is_file()


def test_a_directory_comes_before_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = Model(model_name_or_path="gpt2")
    assert config_of_model(named)["n_embd"] == 768
    Path("gpt2").mkdir()
    Path("gpt2/config.json").write_text('{"model_type": "gpt2", "n_embd": 5}', encoding="utf-8")
    assert config_of_model(named)["n_embd"] == 5


def test_a_downloaded_model_comes_before_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    named = Model(model_name_or_path="openai-community/gpt2")
    assert config_of_model(named)["n_embd"] == 768
    for revision, width in (("main", 6), ("v2", 7)):
        kept = tmp_path / "models--openai-community--gpt2"
        (kept / "snapshots" / f"commit-{revision}").mkdir(parents=True)
        (kept / "refs").mkdir(exist_ok=True)
        (kept / "refs" / revision).write_text(f"commit-{revision}", encoding="utf-8")
        written = json.dumps({"model_type": "gpt2", "n_embd": width})
        (kept / "snapshots" / f"commit-{revision}" / "config.json").write_text(written, encoding="utf-8")
    assert config_of_model(named)["n_embd"] == 6
    assert config_of_model(named.model_copy(update={"revision": "v2"}))["n_embd"] == 7


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
        folder_of(name)
    (problem,) = caught.value.problems
    assert near in problem.fix
    assert "A directory with the model's config.json always works" in problem.fix
