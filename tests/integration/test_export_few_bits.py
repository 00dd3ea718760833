"""Exports in few bits: codes that stay the run's own, and a rounding that says what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe, rows_file

import ftune as package
from ftune import chat, export, plugin, rundir
from ftune.adapters.pooled import fold_pooled
from ftune.errors import RecipeError, RunError
from ftune.quantized.files import read_codes
from ftune.quantized.model import codes_of
from ftune.weights import coded, folded
from ftune.weights.folded import Streamed

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = [[0, 20, 30, 40, 50, 60]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable[..., Path]) -> Path:
    """Return a folder with finished runs `qalora-2` ... `qalora-8`, `lora` and `qlora` on one base."""
    folder = tmp_path_factory.mktemp("few-bits")
    make_tiny(folder / "base", hidden_size=64, intermediate_size=128, initializer_range=0.05)
    rows = rows_file(folder / "rows.jsonl", 8)
    groups = {"method": "qalora", "r": 4, "group_size": 32, "fit": "minmax"}
    tunings = {f"qalora-{bits}": {**groups, "bits": bits} for bits in (2, 3, 4, 8)}
    tunings |= {"lora": {"method": "lora", "r": 4}, "qlora": {"method": "qlora", "r": 4}}
    training = {"max_steps": 4, "learning_rate": 1e-2, "sample_prompts": ["Say hello"]}
    for name, tuning in tunings.items():
        package.train(recipe(folder / "base", rows, folder / name, training=training, tuning=tuning))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=torch.tensor(IDS)).logits
    return made


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_low_bit_keeps_every_code(bits: int, home: Path, tmp_path: Path) -> None:
    run = home / f"qalora-{bits}"
    made = export.export(run, tmp_path / "out", format="low_bit")
    assert made.max_difference < 1e-4
    assert made.losses[0] == pytest.approx(made.losses[1], abs=1e-5)
    before, after = read_codes(run / "model" / rundir.CODES), read_codes(tmp_path / "out" / rundir.CODES)
    assert len(before) == len(after) == 14
    for name, codes in before.items():
        assert torch.equal(codes.packed, after[name].packed)
        assert torch.equal(codes.scale, after[name].scale)
        assert not torch.equal(codes.offset, after[name].offset)
    fresh = chat.open_target(str(tmp_path / "out"))[0]
    assert set(codes_of(fresh)) == set(before)
    assert (logits(fresh) - logits(chat.open_target(str(run))[0])).abs().max() < 1e-4


def test_the_rest_may_take_16_bits_and_offsets_do_not(home: Path, tmp_path: Path) -> None:
    made = export.export(home / "qalora-4", tmp_path / "out", format="low_bit", dtype="bfloat16")
    assert 0 < made.mean_divergence < 2e-3
    codes = read_codes(tmp_path / "out" / rundir.CODES)
    assert {(one.scale.dtype, one.offset.dtype) for one in codes.values()} == {(torch.float32, torch.float32)}
    assert chat.open_target(str(tmp_path / "out"))[0].get_input_embeddings().weight.dtype == torch.bfloat16


_PLAIN = """
import json, sys, torch, transformers
sys.modules["ftune"] = None
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""


@pytest.mark.parametrize(
    ("bits", "dtype", "off"), [*((bits, "float32", 1e-4) for bits in (2, 3, 4, 8)), (4, "bfloat16", 0.05)]
)
def test_torchao_is_read_by_plain_transformers_in_a_fresh_process(
    bits: int, dtype: str, off: float, home: Path, tmp_path: Path
) -> None:
    run = home / f"qalora-{bits}"
    export.export(run, tmp_path / "out", format="torchao", dtype=dtype)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PLAIN, str(tmp_path / "out"), json.dumps(IDS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert (found - logits(chat.open_target(str(run))[0])).abs().max() < off


@pytest.mark.parametrize("run", ["lora", "qlora"])
def test_nf4_is_the_sum_rounded_once_and_says_what_it_costs(
    run: str, home: Path, tmp_path: Path, ftune: Callable[..., Any]
) -> None:
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM

    from ftune.adapters import bits

    answer = ftune("export", home / run, "--format", "nf4", "--output", tmp_path / "out", "--dtype", "float32")
    assert answer.returncode == 0, answer.stderr
    assert "half a step of the codes" in answer.stderr
    before, _, after = answer.stdout.partition("loss ")[2].splitlines()[0].partition(" -> ")
    assert float(before) != float(after)
    merged = export.merge(home / run, tmp_path / "merged")
    assert merged.losses[0] == pytest.approx(merged.losses[1], abs=1e-4)
    assert float(before) == pytest.approx(merged.losses[0], abs=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    bits.keep_differentiable(written)
    name = "model.layers.1.mlp.up_proj"
    codes, state = functional.quantize_4bit(
        whole.get_submodule(name).weight.data, quant_type="nf4", compress_statistics=True
    )
    expected = functional.dequantize_4bit(codes, state)
    assert torch.equal(bits.dequantised_weight(written.get_submodule(name)), expected)


ONE = "model.layers.1.self_attn.v_proj"
"""A layer whose adapter is lost: the smallest there is."""


@pytest.mark.parametrize(
    ("where", "form", "dtype"),
    [
        ("folding", "nf4", "bfloat16"),
        ("writing", "nf4", "bfloat16"),
        ("writing", "gguf", "q8_0"),
        *[
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                *[("folding", "safetensors", "bfloat16"), ("writing", "nf4", "float32")],
                *[("writing", "gguf", "bfloat16"), ("writing", "gguf", "float16")],
                *[("writing", "safetensors", "bfloat16"), ("writing", "hub", "float16")],
            )
        ],
    ],
)
def test_the_adapter_of_one_layer_is_missed(
    where: str, form: str, dtype: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost while it is folded in, the answers of the whole weights show it; lost later, the weights themselves do."""
    fold, read = Streamed._fold, Streamed.read
    if where == "folding":
        monkeypatch.setattr(
            Streamed,
            "_fold",
            lambda self, part: (
                {f"{ONE}.weight": self.stored(f"{ONE}.weight").float()} if part.path == ONE else fold(self, part)
            ),
        )
    else:
        found = type(plugin.export(form))
        write = found.write

        def lose(*arguments: Any, **options: Any) -> None:
            with monkeypatch.context() as during:
                during.setattr(
                    Streamed, "read", lambda self, name: (self.stored if ONE in name else partial(read, self))(name)
                )
                write(*arguments, **options)

        monkeypatch.setattr(found, "write", lose)
    what = "the whole weights, not rounded yet" if where == "folding" else f"the written `{ONE}.weight` is not"
    assert_refused(home / "lora", tmp_path, form, dtype, what)


@pytest.mark.parametrize(
    ("where", "form"),
    [
        *[("folding", "low_bit"), ("writing", "torchao")],
        *[pytest.param(*one, marks=pytest.mark.slow) for one in (("folding", "torchao"), ("writing", "low_bit"))],
    ],
)
def test_the_adapter_of_one_layer_of_codes_is_missed(
    form: str, where: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(model: Any, *, over: type) -> Any:
        model.get_submodule(f"base_model.model.{ONE}").lora_B["default"].weight.data.zero_()
        return fold_pooled(model, over=over)

    monkeypatch.setattr(folded if where == "folding" else coded, "fold_pooled", lose)
    what = "the whole weights, not rounded yet" if where == "folding" else f"the written `{ONE}.weight` is not"
    assert_refused(home / "qalora-4", tmp_path, form, "bfloat16", what)


def assert_refused(run: Path, beside: Path, form: str, dtype: str, what: str) -> None:
    with pytest.raises(RunError) as caught:
        export.export(run, beside / "out", format=form, dtype=dtype)
    assert caught.value.problems[0].rule == "export-differs"
    assert caught.value.problems[0].what.startswith(what)
    assert list(beside.iterdir()) == []


@pytest.mark.parametrize(("form", "parts"), [("low_bit", ("codes", "rest")), ("torchao", ("model",))])
def test_few_bits_in_shards(form: str, parts: tuple[str, ...], home: Path, tmp_path: Path) -> None:
    for name, size in (("whole", None), ("shards", "40KB")):
        export.export(home / "qalora-3", tmp_path / name, format=form, max_shard_size=size)
    for part in parts:
        assert [path.name for path in (tmp_path / "whole").glob(f"{part}*.safetensors")] == [f"{part}.safetensors"]
        found = sorted((tmp_path / "shards").glob(f"{part}-*-of-*.safetensors"))
        assert len(found) > 1
        assert not (tmp_path / "shards" / f"{part}.safetensors").exists()
        # A header of its own, and at least one tensor however large: the embedding alone is more than 40 KB.
        assert sum(path.stat().st_size > 80_000 for path in found) <= 2
    whole, shards = (chat.open_target(str(tmp_path / name))[0] for name in ("whole", "shards"))
    assert torch.equal(logits(whole), logits(shards))
    next((tmp_path / "shards").glob(f"{parts[0]}-*2-of-*.safetensors")).unlink()
    with pytest.raises(RunError) as caught:
        chat.open_target(str(tmp_path / "shards"))
    assert caught.value.problems[0].rule in ("weights-do-not-fit", "weights-damaged")


@pytest.mark.parametrize("form", ["low_bit", "torchao"])
def test_a_run_without_codes_is_refused(form: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no codes to write"):
        export.export(home / "lora", tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()
