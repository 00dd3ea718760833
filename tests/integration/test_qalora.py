"""QA-LoRA in whole runs: it learns, goes on to the same bits on the same codes, is one on two ranks, and merges."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tokenizer
from training_runs import losses, metrics, recipe, rows_file, same_bits, weights

import ftune
from ftune import export, rebuild
from ftune.errors import RecipeError, RunError
from ftune.machine import probe
from ftune.models.finished import load_finished, of_folder, of_run
from ftune.models.load import load_model
from ftune.quantized.files import fingerprint, read_codes
from ftune.quantized.model import codes_of
from ftune.quantized.saved import save_quantized
from ftune.recipe.schema import Model
from ftune.training import resuming, run

ROOT = Path(__file__).parents[2]
HQQ = ROOT / "tests" / "hqq_checkpoints"
TUNING: dict[str, Any] = {"method": "qalora", "r": 4, "group_size": 16, "fit": "minmax"}
TRAINING: dict[str, Any] = {"num_train_epochs": 2, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60)[None], use_cache=False).logits.float()


@pytest.mark.parametrize(
    ("fit", "bits", "dtype"),
    [("minmax", 2, "float32"), ("hqq", 3, "bfloat16"), ("gptq", 4, "bfloat16"), ("gptq", 8, "float32")],
)
def test_it_learns_with_every_fit(
    fit: str, bits: int, dtype: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    tuning = {**TUNING, "fit": fit, "bits": bits, "calibration_rows": 4}
    model = {"dtype": dtype}
    found = ftune.train(
        recipe(tiny_model, rows, tmp_path / "run", model=model, tuning=tuning, data={"eval": 0.1}, training=TRAINING)
    )
    course = losses(found.directory)
    assert sum(course[-4:]) < 0.95 * sum(course[:4])
    codes = read_codes(tmp_path / "run" / "codes.safetensors")
    assert {one.bits for one in codes.values()} == {bits}
    assert set(codes) == {name for name in codes if "layers" in name}
    assert len(codes) == 14
    # What is loaded again says what the run ended with.
    evaluated = [line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert evaluated[-1] == pytest.approx(found.eval_loss)
    assert fingerprint(codes_of(load_finished(of_run(tmp_path / "run")).get_base_model())) == fingerprint(codes)


def test_a_stopped_run_goes_on_to_the_same_bits_and_on_no_other_codes(
    tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    training = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine"}
    tuning = {**TUNING, "fit": "gptq", "calibration_rows": 4, "lora_dropout": 0.2}
    whole = Path(ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning, training=training)).directory)
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(stopped / "model")
    for path in (stopped / "checkpoints").glob("*"):
        if path.name != "checkpoint-4":
            shutil.rmtree(path)
    (stopped / "result.json").unlink()
    changed = shutil.copytree(stopped, tmp_path / "changed")
    saved = {path.name for path in (stopped / "checkpoints" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "codes.safetensors" not in saved
    continued = resuming.reopen(stopped, (), probe())
    run.train(continued.spec, checkpoint=continued.checkpoint)
    assert same_bits(weights(whole), weights(stopped))
    assert losses(whole) == losses(stopped)

    other = recipe(tiny_model, rows, tmp_path / "other", tuning=TUNING, training={"max_steps": 1})
    shutil.copyfile(Path(ftune.train(other).directory) / "codes.safetensors", changed / "codes.safetensors")
    continued = resuming.reopen(changed, (), probe())
    with pytest.raises(RunError, match="other quantised weights"):
        run.train(continued.spec, checkpoint=continued.checkpoint)


def test_two_ranks_are_one_with_both_halves(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    tuning = {**TUNING, "fit": "gptq", "calibration_rows": 4}
    # Not Adam, which makes as much of the rounding of a gradient near zero as of any other gradient.
    shared = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4}
    alone = recipe(
        tiny_model, rows, tmp_path / "one", tuning=tuning, training={**shared, "per_device_train_batch_size": 8}
    )
    one = ftune.train(alone).directory
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_model, rows, tmp_path / "two", tuning=tuning, training=shared)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python"]
    command += [sys.executable, "-m", "ftune", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-6)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=1e-5, atol=1e-6)
        assert "lora_B" not in name or weight.abs().max() > 1e-4, "it learned"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path) -> Path:
    """Return the directory of a run that moved its base well."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    changes = {"tuning": {**TUNING, "bits": 3}, "training": {**TRAINING, "learning_rate": 1e-2}}
    return Path(ftune.train(recipe(tiny_model, rows, folder, **changes)).directory)


def test_the_result_is_whole_away_from_its_run(trained: Path, tmp_path: Path) -> None:
    """The adapter's folder has the codes with it, taking no second room on the disk."""
    assert (trained / "model" / "codes.safetensors").samefile(trained / "codes.safetensors")
    moved = shutil.copytree(trained / "model", tmp_path / "moved")
    expected = logits(load_finished(of_run(trained)))
    assert torch.equal(logits(load_finished(of_folder(moved))), expected)
    (moved / "codes.safetensors").unlink()
    assert (logits(load_finished(of_folder(moved))) - expected).abs().max() > 1e-2  # as plain LoRA on the plain base


def test_a_merge_is_proved_and_loads_anywhere(trained: Path, tmp_path: Path) -> None:
    merged = export.merge(trained, tmp_path / "merged")
    assert merged.max_difference <= 1e-4
    expected = logits(load_finished(of_run(trained)))
    found = load_model(Model(model_name_or_path=str(tmp_path / "merged"), dtype="float32"))
    assert (logits(found) - expected).abs().max() <= 1e-4
    assert not codes_of(found)


def test_a_merged_model_in_few_bits_is_trained_further_on_its_own_codes(
    trained: Path, rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from ftune.adapters.pooled import fold_pooled
    from ftune.quantized.linear import QuantizedLinear

    merged = fold_pooled(load_finished(of_run(trained)), over=QuantizedLinear)
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "model.safetensors").unlink()
    save_quantized(merged, base, max_shard_size="5GB")
    again = {"method": "qalora", "r": 4}
    result = ftune.train(recipe(base, rows, tmp_path / "run", tuning=again, training={**TRAINING, "max_steps": 4}))
    assert losses(result.directory)[0] < losses(trained)[0] - 0.2
    assert fingerprint(read_codes(tmp_path / "run" / "codes.safetensors")) == fingerprint(codes_of(merged))
    with pytest.raises(RecipeError, match=r"bits: 4 is not what this model was quantised with.*has 3"):
        ftune.train(recipe(base, rows, tmp_path / "differs", tuning={**again, "bits": 4}))
    with pytest.raises(RecipeError, match="cannot move the weights of a quantised model"):
        ftune.train(recipe(base, rows, tmp_path / "full", tuning={"method": "full"}))


@pytest.mark.parametrize("saved", ["transformers", "package"])
def test_an_hqq_model_is_trained_upon_its_own_codes(saved: str, rows: Path, tmp_path: Path) -> None:
    base = shutil.copytree(HQQ / saved, tmp_path / "base")
    make_tokenizer().save_pretrained(base)
    codes = codes_of(load_model(Model(model_name_or_path=str(base), dtype="float32")))
    training = {**TRAINING, "learning_rate": 1e-2}
    result = ftune.train(recipe(base, rows, tmp_path / "run", tuning={"method": "qalora", "r": 4}, training=training))
    course = losses(result.directory)
    assert sum(course[-4:]) < 0.9 * sum(course[:4])
    assert fingerprint(read_codes(tmp_path / "run" / "codes.safetensors")) == fingerprint(codes)
    expected = logits(load_finished(of_run(tmp_path / "run")))

    assert export.merge(tmp_path / "run", tmp_path / "merged").max_difference <= 1e-4
    merged = load_model(Model(model_name_or_path=str(tmp_path / "merged"), dtype="float32"))
    assert (logits(merged) - expected).abs().max() <= 1e-4

    export.export(tmp_path / "run", tmp_path / "coded", format="low_bit")
    coded = load_model(Model(model_name_or_path=str(tmp_path / "coded"), dtype="float32"))
    assert (logits(coded) - expected).abs().max() <= 1e-4
    for name, kept in codes_of(coded).items():
        assert torch.equal(kept.packed, codes[name].packed)
        assert torch.equal(kept.scale, codes[name].scale)
        assert not torch.equal(kept.offset, codes[name].offset)


@pytest.mark.parametrize("saved", ["transformers", "package"])
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("full", "cannot move the weights of a quantised model.*tuning.method: qalora"),
        ("lora", "cannot be trained upon the codes of this hqq model.*tuning.method: qalora"),
        ("qlora", "cannot be trained upon the codes of this hqq model.*tuning.method: qalora"),
    ],
)
def test_other_methods_are_told_of_it(saved: str, method: str, said: str, rows: Path, tmp_path: Path) -> None:
    """Before anything is loaded, though the package's config.json does not say that the model is quantised."""
    problems = ftune.check(recipe(HQQ / saved, rows, tmp_path / "run", tuning={"method": method}))
    assert [re.search(said, str(one)) is not None for one in problems if one.rule == "base-quantised"] == [True]


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ({"group_size": 48}, "32 inputs.*no whole number of groups of 48.*8, 16, 32"),
        ({"target_modules": ["query"]}, "no layer `query`"),
        ({"target_modules": ["lm_head"]}, "no adapter can be put on `lm_head`.*q_proj"),
        ({"target_modules": ["embed_tokens"]}, "no adapter can be put on `model.embed_tokens`"),
        ({"bits": 5}, "bits"),
    ],
)
def test_what_cannot_be_is_refused(
    tuning: dict[str, Any], said: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning={**TUNING, **tuning}))


def test_checkpointed_activations_change_nothing(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        training = {"max_steps": 3, "gradient_checkpointing": checkpointing}
        values = recipe(tiny_model, rows, tmp_path / str(checkpointing), tuning=TUNING, training=training)
        found.append(losses(ftune.train(values).directory))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def forward_only(tuning: dict[str, Any], tiny_model: Path, rows: Path, tmp_path: Path) -> Path:
    training = {"optim": "mezo", "max_steps": 3}
    return Path(ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning, training=training)).directory)


def test_a_forward_only_run_is_rebuilt_upon_its_own_codes(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    trained = forward_only({**TUNING, "fit": "gptq", "calibration_rows": 4}, tiny_model, rows, tmp_path)
    rebuild.rebuild(trained, tmp_path / "rebuilt")
    found = load_finished(of_folder(tmp_path / "rebuilt"))
    assert torch.equal(logits(found), logits(load_finished(of_run(trained))))
    (trained / "codes.safetensors").unlink()
    assert_rows_are_missed(trained, tmp_path / "again")


def test_a_forward_only_run_that_began_with_its_rows_is_not(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    tuning = {"method": "lora", "init_lora_weights": "eva", "r": 4, "eva_batches": 2}
    assert_rows_are_missed(forward_only(tuning, tiny_model, rows, tmp_path), tmp_path / "again")


def assert_rows_are_missed(run: Path, output: Path) -> None:
    with pytest.raises(RunError, match="its rows are not at hand") as caught:
        rebuild.rebuild(run, output)
    assert caught.value.problems[0].rule == "zeroth-order-log"
    assert not output.exists()


def test_some_layers_have_an_adapter_and_all_are_quantised(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    tuning = {**TUNING, "target_modules": ["q_proj", "v_proj"]}
    result = ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning, training={"max_steps": 1}))
    assert len(read_codes(tmp_path / "run" / "codes.safetensors")) == 14
    adapted = {name.split(".")[-3] for name in weights(result.directory) if "lora" in name}
    assert adapted == {"q_proj", "v_proj"}
    assert json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())["peft_type"] == "LORA"
