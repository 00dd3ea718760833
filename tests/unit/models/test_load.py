from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftune.errors import FtuneError, RecipeError, RunError
from ftune.models.load import load_model, load_tokenizer, max_positions
from ftune.recipe.schema import Model


def decided(folder: Path | str, **more: Any) -> Model:
    return Model(**{"model_name_or_path": str(folder), "dtype": "float32", "attn_implementation": "sdpa", **more})


def refused(folder: Path, **more: Any) -> FtuneError:
    with pytest.raises(FtuneError) as caught:
        load_model(decided(folder, **more))
    return caught.value


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_weight_is_the_files_in_the_chosen_type(tiny_model: Path, dtype: str, hush: Callable[[], None]) -> None:
    model = load_model(decided(tiny_model, dtype=dtype))
    hush()
    stored = load_file(tiny_model / "model.safetensors")
    assert dict(model.named_parameters()).keys() == stored.keys()
    for name, weight in model.named_parameters():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, stored[name].to(weight.dtype))
    assert max_positions(model) == 256
    assert model.config._attn_implementation == "sdpa"
    assert model.name_or_path == str(tiny_model)


def test_the_library_settings_are_put_back(tiny_model: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(decided(tiny_model))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_missing_padding_token_becomes_the_end_token_and_is_said(copied: Path) -> None:
    path = copied / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    said: list[str] = []
    tokenizer = load_tokenizer(decided(copied), said.append)
    assert tokenizer.pad_token == "<|im_end|>"
    assert len(said) == 1
    assert "padding" in said[0]


def test_padding_token_of_its_own_stays(tiny_model: Path) -> None:
    said: list[str] = []
    assert load_tokenizer(decided(tiny_model), said.append).pad_token == "<|pad|>"
    assert said == []


def test_a_missing_weight_is_refused_by_name(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    error = refused(copied)
    assert isinstance(error, RunError)
    assert "missing: model.layers.1.mlp.up_proj.weight" in error.problems[0].why


def test_an_unexpected_weight_is_refused_but_old_constants_are_not(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    load_model(decided(copied))
    weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(4)
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert "not part of the model: model.layers.2.mlp.up_proj.weight" in refused(copied).problems[0].why


def test_a_weight_of_another_shape_is_refused_with_both_shapes(copied: Path) -> None:
    change_config(copied, intermediate_size=48)
    why = refused(copied).problems[0].why
    assert "model.layers.0.mlp.down_proj.weight (32, 64) instead of (32, 48)" in why


def test_tied_output_layer_needs_no_weight_of_its_own(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert "lm_head.weight" in refused(copied).problems[0].why
    change_config(copied, tie_word_embeddings=True)
    model = load_model(decided(copied))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("left", [100, 30_000])
def test_truncated_weights_are_damaged(copied: Path, left: int) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    error = refused(copied)
    assert isinstance(error, RunError)
    assert error.problems[0].rule == "weights-damaged"


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory")
@pytest.mark.parametrize("left", [30, 90])
def test_too_little_memory_is_no_damage(
    left: int, tiny_model: Path, tmp_path: Path, make_tiny: Callable[..., Path]
) -> None:
    make_tiny(tmp_path, vocab_size=500_000, dtype="bfloat16")
    code = (
        "import resource, sys\n"
        "from ftune.models.load import load_model\n"
        "from ftune.recipe.schema import Model\n"
        "load_model(Model(model_name_or_path=sys.argv[2], dtype='float32'))\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]) * 2**20,) * 2)\n"
        "try:\n    load_model(Model(model_name_or_path=sys.argv[1], dtype='float32'))\n"
        "except Exception as error:\n    print(type(error).__name__, error.problems[0].rule)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, tiny_model, str(left)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "MachineError out-of-memory\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("advice", "package"),
    [
        ("`pip install -U bitsandbytes>=0.46.1`", "bitsandbytes"),
        ("please run pip install --upgrade 'flash-attn'", "flash-attn"),
        ("pip install einops", "einops"),
    ],
)
def test_the_package_in_a_librarys_advice(advice: str, package: str) -> None:
    from ftune.models.load import _package_missing

    assert _package_missing(ImportError(advice)).problems[0].fix == f"pip install {package}"


def test_a_missing_shard_is_named(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    error = refused(copied)
    assert error.problems[0].rule == "weights-damaged"
    assert "model-00002-of-00002.safetensors" in error.problems[0].why


def test_a_folder_without_weights_or_config(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "holds no weights" in refused(copied).problems[0].why
    (copied / "config.json").unlink()
    error = refused(copied)
    assert isinstance(error, RecipeError)
    assert "no config.json" in error.problems[0].why


def test_broken_config(copied: Path) -> None:
    (copied / "config.json").write_text('{"model_type": ')
    assert refused(copied).problems[0].rule == "weights-damaged"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "encoder that sees"),
        ({"model_type": "roberta", "architectures": ["RobertaForCausalLM"]}, "encoder that sees"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "encoder and",
        ),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "encoder and"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "no head"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "something else"),
    ],
)
def test_other_kinds_of_model_are_refused_before_the_weights_are_read(
    copied: Path, values: dict[str, Any], says: str
) -> None:
    change_config(copied, **values)
    (copied / "model.safetensors").write_bytes(b"not read")
    error = refused(copied)
    assert isinstance(error, RecipeError)
    assert error.problems[0].rule == "not-a-causal-lm"
    assert says in error.problems[0].what


def test_a_bert_that_is_a_decoder_is_accepted(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=20, is_decoder=True, **small)).save_pretrained(tmp_path)
    assert load_model(decided(tmp_path, attn_implementation="eager")).config.is_decoder


def test_remote_code_is_never_run_unasked(copied: Path) -> None:
    (copied / "code.py").write_text("raise SystemExit('the code was run')")
    change_config(copied, model_type="mystery", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    for load in (load_model, load_tokenizer):
        with pytest.raises(RecipeError) as caught:
            load(decided(copied))
        assert caught.value.problems[0].rule == "remote-code"
        assert "model.trust_remote_code" in caught.value.problems[0].fix
    with pytest.raises(SystemExit, match="the code was run"):
        load_model(decided(copied, trust_remote_code=True))


def test_unknown_architecture_names_the_near_one(copied: Path) -> None:
    change_config(copied, model_type="lama")
    problem = refused(copied).problems[0]
    assert problem.rule == "unknown-architecture"
    assert "`llama`" in problem.fix


def test_damaged_tokenizer(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{")
    with pytest.raises(RecipeError) as caught:
        load_tokenizer(decided(copied))
    assert caught.value.problems[0].rule == "no-tokenizer"


def test_pickled_weights_are_read_from_trusted_authors_alone(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    torch.save(stored, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    error = refused(folder)
    assert isinstance(error, RunError)
    assert error.problems[0].rule == "pickle-weights"
    assert "pytorch_model.bin" in error.problems[0].what
    model = load_model(decided(folder, trust_remote_code=True))
    assert all(torch.equal(weight, stored[name]) for name, weight in model.named_parameters())
