from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import write_run
from safetensors.torch import load_file

from ftune import export, rundir
from ftune.errors import FtuneError, RecipeError, RunError
from ftune.models.load import load_model
from ftune.recipe.schema import Model
from ftune.weights.folded import Streamed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tied layer is part of the adapter.*:UserWarning"),
]
ALPHA, RANK = 12.0, 3
SETTINGS: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}


def adapt(run: Path, base: Path, **changes: Any) -> Any:
    """Save an adapter that has learnt something into a run; return it, attached to its base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    model = load_model(Model(model_name_or_path=str(base), dtype="float32"))
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**{**SETTINGS, **changes}))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and "lora_A" not in name:
                weight.add_(torch.randn_like(weight) * 0.05)
    adapted.save_pretrained(run / rundir.MODEL)
    AutoTokenizer.from_pretrained(base).save_pretrained(run / rundir.MODEL)
    return adapted.eval()


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tiny_model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[0, 20, 30, 40, 50, 60]])).logits


def test_merged_weights_are_the_formula(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The oracle: W + (alpha / r) B A in float64, from the files alone."""
    adapt(run, tiny_model)
    export.merge(run, tmp_path / "merged")
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "merged"))
    adapter = load_file(run / rundir.MODEL / "adapter_model.safetensors")
    touched = 0
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight.double()
        if f"{layer}.lora_A.weight" in adapter:
            down, up = (adapter[f"{layer}.lora_{part}.weight"].double() for part in "AB")
            assert up.abs().max() > 0
            expected = expected + ALPHA / RANK * (up @ down)
            assert (expected - weight).abs().max() > 1e-3
            touched += 1
        assert (merged[name].double() - expected).abs().max() < 1e-6
    assert touched == 14


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [20, 40]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.up_proj": 2}},
        {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True, "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_kind_of_adapter_merges_to_the_same_model(
    changes: dict[str, Any], tied: bool, tmp_path: Path, make_tiny: Callable[..., Path]
) -> None:
    base = make_tiny(tmp_path / "base", tie_word_embeddings=tied)
    run = write_run(tmp_path / "run", base)
    adapted = adapt(run, base, **changes)
    said = export.merge(run, tmp_path / "merged")
    assert said.dtype == "float32"
    assert said.max_difference < 1e-4
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(plain), logits(adapted), atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("changes", [{}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=str)
@pytest.mark.parametrize(("tied", "free_bytes"), [(False, None), (True, None), (True, 0)])
def test_the_result_is_stored_as_the_base_is(
    dtype: str,
    changes: dict[str, Any],
    tied: bool,
    free_bytes: int | None,
    tmp_path: Path,
    make_tiny: Callable[..., Path],
) -> None:
    base = make_tiny(tmp_path / "base", dtype=dtype, initializer_range=0.05, tie_word_embeddings=tied)
    run = write_run(tmp_path / "run", base)
    adapt(run, base, **changes)
    made = export.merge(run, tmp_path / "merged", free_bytes=free_bytes)
    assert made.dtype == dtype
    assert made.max_difference > 0
    assert made.folded is not None
    assert made.folded < 1e-7
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


def test_the_command_says_what_it_proved(
    run: Path, tiny_model: Path, tmp_path: Path, ftune: Callable[..., Any]
) -> None:
    adapt(run, tiny_model)
    answer = ftune("merge", run, "--output", tmp_path / "deep" / "merged")
    assert answer.returncode == 0, answer.stderr
    assert "merged == adapter on 5 prompts: largest logit difference" in answer.stdout
    said = ["asking the run's model, in memory", "writing safetensors in float32", "asking what was written, in memory"]
    assert [line for line in answer.stderr.splitlines() if line in said] == said
    merged = tmp_path / "deep" / "merged"
    from transformers import AutoTokenizer

    templates = {AutoTokenizer.from_pretrained(folder).chat_template for folder in (merged, tiny_model)}
    assert len(templates) == 1
    again = ftune("merge", run, "--output", merged)
    assert again.returncode == 2
    assert "not empty" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize("spoil", ["lose", "change", "nan"])
def test_a_merge_that_differs_is_not_kept(
    spoil: str, run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt(run, tiny_model)
    read = Streamed.read

    def spoilt(weights: Streamed, name: str) -> torch.Tensor:
        if spoil == "lose":
            return weights.stored(name)
        value = read(weights, name)
        if name == "model.layers.1.mlp.up_proj.weight":
            value[0, 0] += 0.5 if spoil == "change" else float("nan")
        return value

    monkeypatch.setattr(Streamed, "read", spoilt)
    with pytest.raises(RunError) as caught:
        export.merge(run, tmp_path / "out" / "merged")
    assert caught.value.problems[0].rule == "export-differs"
    assert list((tmp_path / "out").iterdir()) == []


def refused(run: Path, output: Path) -> FtuneError:
    with pytest.raises(FtuneError) as caught:
        export.merge(run, output)
    assert not (output / "config.json").exists()
    return caught.value


def test_what_lies_beside_the_output_is_left_alone(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    adapt(run, tiny_model)
    (tmp_path / "keep.partial").mkdir()
    (tmp_path / "keep.partial" / "mine.txt").write_text("mine")
    (tmp_path / "other.partial").write_text("mine too")
    before = {path.name for path in tmp_path.iterdir()}
    for name in ("keep", "other"):
        export.merge(run, tmp_path / name)
        assert (tmp_path / name / "config.json").is_file()
    assert (tmp_path / "keep").stat().st_mode == (tmp_path / "keep.partial").stat().st_mode
    assert (tmp_path / "keep.partial" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "other.partial").read_text() == "mine too"
    assert {path.name for path in tmp_path.iterdir()} == {*before, "keep", "other"}


def test_what_came_to_lie_in_the_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def write() -> None:
        with export._written_whole(tmp_path / "out") as partial:
            (partial / "config.json").write_text("{}")
            (tmp_path / "out" / "mine.txt").write_text("mine")

    with pytest.raises(RunError) as caught:
        write()
    assert caught.value.problems[0].rule == "output-unwritable"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_output_that_can_be_no_path(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    adapt(run, tiny_model)
    with pytest.raises(RecipeError) as caught:
        export.merge(run, tmp_path / ("x" * 300))
    assert caught.value.problems[0].rule == "bad-path"


def test_no_prompt_is_longer_than_the_positions(tmp_path: Path) -> None:
    from conftest import make_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path / "base"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2, n_positions=16)).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    run = write_run(tmp_path / "run", base)
    adapt(run, base, fan_in_fan_out=True)
    assert export.merge(run, tmp_path / "merged").prompts == 5


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_is_refused_in_words(tmp_path: Path) -> None:
    """An adapter learns on it, and cannot be merged with it."""
    from conftest import make_model, make_tokenizer
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "plain")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    base = tmp_path / "base"
    quantised.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    run = write_run(tmp_path / "run", base)
    adapt(run, base)
    error = refused(run, tmp_path / "merged")
    assert isinstance(error, RecipeError)
    assert error.problems[0].rule == "base-quantised"


def test_refusals(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    from shutil import copytree

    output = tmp_path / "merged"
    missing = refused(tmp_path / "nowhere", output)
    assert isinstance(missing, RunError)
    assert missing.problems[0].rule == "no-run"
    unfinished = refused(run, output)
    assert isinstance(unfinished, RunError)
    assert unfinished.problems[0].rule == "no-finished-model"
    assert "ftune resume" in unfinished.problems[0].fix
    copytree(tiny_model, run / rundir.MODEL)
    assert refused(run, output).problems[0].rule == "not-an-adapter"


def test_damaged_adapters(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    adapt(run, tiny_model)
    path = run / rundir.MODEL / "adapter_model.safetensors"
    whole = load_file(path)
    lacking = {name: weight for name, weight in whole.items() if "layers.1.mlp.up_proj" not in name}
    save_file(lacking, path, {"format": "pt"})
    error = refused(run, tmp_path / "merged")
    assert error.problems[0].rule == "weights-damaged"
    assert "layers.1.mlp.up_proj" in error.problems[0].why
    path.write_bytes(path.read_bytes()[:300])
    assert refused(run, tmp_path / "merged").problems[0].rule == "weights-damaged"
    save_file({**whole, next(iter(whole)): torch.full_like(next(iter(whole.values())), float("nan"))}, path)
    assert refused(run, tmp_path / "merged").problems[0].rule == "merge-broken"
