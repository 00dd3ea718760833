"""Adapters of every kind in whole runs: what is saved fits the base as everybody has it, also after a stop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from training_runs import EVALUATION, losses, recipe, rows_file, same_bits, weights

import ftune
from ftune import chat, export
from ftune.adapters.rounding import rounding_of
from ftune.errors import RecipeError, RunError
from ftune.machine import probe
from ftune.models.finished import load_finished, of_folder, of_run
from ftune.training import resuming, run

ROOT = Path(__file__).parents[2]
IDS = torch.arange(3, 67).reshape(2, 32)
slow = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora", "lora_dropout": 0.1},
    "loftq": {"method": "qlora", "init_lora_weights": "loftq"},
    "pissa": {"method": "lora", "init_lora_weights": "pissa", "r": 4, "modules_to_save": ["lm_head"]},
    "olora": {
        "method": "lora",
        "init_lora_weights": "olora",
        "r": 4,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 5},
    },
    "eva": {"method": "lora", "init_lora_weights": "eva", "r": 4, "eva_batches": 3},
    "vera": {"method": "vera", "r": 16},
    "dora": {"method": "lora", "use_dora": True, "loraplus_lr_ratio": 4, "trainable_token_indices": [5, 7]},
    "eight-bits": {"method": "qlora", "load_in_8bit": True},
    "quick-pissa": {"method": "lora", "init_lora_weights": "pissa_niter_4", "r": 4},
    "eva-in-four-bits": {"method": "qlora", "init_lora_weights": "eva", "r": 4, "eva_batches": 3, "use_dora": True},
    "vera-on-names": {"method": "vera", "r": 16, "target_modules": ["q_proj", "up_proj"], "vera_dropout": 0.1},
}
OPTIMIZERS = {"qlora": "paged_adamw_8bit", "loftq": "adalomo"}
LONG = ("olora", "eight-bits", "quick-pissa", "eva-in-four-bits", "vera-on-names")
PARAMETERS = [pytest.param(name, marks=slow if name in LONG else ()) for name in CASES]
PLAIN_PEFT = """
import sys, json, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from peft import PeftConfig, PeftModel
base, jobs, out = sys.argv[1:]
found = {}
for name, (adapter, bits) in json.loads(jobs).items():
    more = {"quantization_config": BitsAndBytesConfig(**bits)} if bits else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **more)
    config = PeftConfig.from_pretrained(adapter)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # as of tools that read A and B, and know no other beginning
    model = PeftModel.from_pretrained(model, adapter, config=config).eval()
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # a kernel that computes in bfloat16, and fails at a width of 32
    with torch.no_grad():
        found[name] = model(input_ids=torch.arange(3, 67).reshape(2, 32)).logits
torch.save(found, out)
"""


@dataclass(frozen=True)
class Trained:
    """A run, one that was stopped at half and went on, and the logits of both as they ended."""

    whole: Path
    resumed: Path
    logits: tuple[torch.Tensor, torch.Tensor]

    @property
    def bits(self) -> Any:
        """How its base was held: arguments of BitsAndBytesConfig."""
        return of_run(self.whole).quantization


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 32)


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "other.jsonl", 8, source=EVALUATION)


@pytest.fixture(scope="module")
def ends() -> Any:
    """Return what notes the logits of each model as it is when it is saved."""
    noted: list[torch.Tensor] = []
    finish = run.finish

    def noting(trainer: Any, *arguments: Any, **named: Any) -> Any:
        model = trainer.model.eval()
        with torch.no_grad():
            noted.append(model(input_ids=IDS).logits.clone())
        return finish(trainer, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "finish", noting)
        yield noted


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, rows: Path, other_rows: Path, ends: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Return a function that trains a case twice, the second time with a stop, and remembers it."""
    found: dict[str, Trained] = {}

    def train(name: str) -> Trained:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            optim = OPTIMIZERS.get(name, "adamw_torch")
            settings = {
                "optim": optim,
                "max_steps": 4,
                "save_strategy": "steps",
                "save_steps": 2,
                "learning_rate": 3e-3,
            }
            values = recipe(
                *(tiny_model, rows, folder / "whole"),
                tuning=CASES[name],
                data={"eval": str(other_rows)},
                training={**settings, "eval_strategy": "steps", "eval_steps": 1, "sample_prompts": ["What?"]},
            )
            whole = Path(ftune.train(values).directory)
            stopped = shutil.copytree(whole, folder / "stopped")
            shutil.rmtree(stopped / "model")
            shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
            (stopped / "result.json").unlink()
            continued = resuming.reopen(stopped, (), probe())
            assert continued.checkpoint is not None
            run.train(continued.spec, checkpoint=continued.checkpoint)
            found[name] = Trained(whole, stopped, (ends[-2], ends[-1]))
        return found[name]

    return train


@pytest.mark.parametrize("name", PARAMETERS)
def test_goes_on_to_the_same_bits(name: str, trained: Any) -> None:
    runs = trained(name)
    assert same_bits(weights(runs.whole), weights(runs.resumed))
    assert losses(runs.whole) == losses(runs.resumed)
    assert len(set(losses(runs.whole))) == 4
    assert torch.equal(*runs.logits)


@pytest.fixture(scope="module")
def plain_peft(trained: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Any:
    """Return the logits that plain PEFT, in a process of its own, gets from each run's base and saved adapter."""
    asking = (item for item in request.session.items if "plain_peft" in item.fixturenames)
    wanted = {item.callspec.params["name"] for item in asking}
    jobs = {}
    for name in wanted:
        runs = trained(name)
        jobs |= {f"{name} {at}": (str(at / "model"), runs.bits) for at in (runs.whole, runs.resumed)}
    out = tmp_path_factory.mktemp("peft") / "logits.pt"
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_PEFT, str(tiny_model), json.dumps(jobs), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.mark.parametrize("name", PARAMETERS)
def test_saved_adapter_on_the_original_base_is_the_trained_model_in_a_fresh_process(
    name: str, trained: Any, plain_peft: Any
) -> None:
    runs = trained(name)
    for at in (runs.whole, runs.resumed):
        torch.testing.assert_close(plain_peft[f"{name} {at}"], runs.logits[0], rtol=0, atol=2e-5)


def test_qlora_adapter_loads_on_the_plain_base_and_is_merged_with_it(
    trained: Any, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    runs = trained("qlora")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = PeftModel.from_pretrained(base, runs.whole / "model").eval()
    merged = export.merge(runs.whole, tmp_path / "merged")
    assert merged.max_difference < 1e-3
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected, found = adapted(input_ids=IDS).logits, whole(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(found, runs.logits[0], atol=1e-2)  # what quantising took is there again


def test_a_run_is_talked_to_as_it_was_trained(trained: Any) -> None:
    model, _ = chat.open_target(str(trained("qlora").whole))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, trained("qlora").logits[0], rtol=0, atol=1e-5)


def test_an_adapter_that_fits_the_rounded_base_is_merged_with_that(trained: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export.merge(trained("loftq").whole, tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = whole(input_ids=IDS).logits
    torch.testing.assert_close(found, trained("loftq").logits[0], rtol=0, atol=1e-4)


def taken_out(run: Path, folder: Path) -> Path:
    """Return a copy of a run's adapter without the run around it."""
    return Path(shutil.copytree(run / "model", folder))


class TestAnAdapterOfTheRoundedBase:
    """By itself it says where it belongs: it is right there, and refused elsewhere."""

    def test_it_is_right_by_itself(self, trained: Any, tmp_path: Path) -> None:
        runs = trained("loftq")
        folder = taken_out(runs.whole, tmp_path / "adapter")
        assert not (folder.parent / "run.json").exists()
        rounded, _ = chat.open_target(str(folder))
        plain = load_finished(of_folder(folder), dtype="float32")
        with torch.no_grad():
            torch.testing.assert_close(rounded(input_ids=IDS).logits, runs.logits[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(plain(input_ids=IDS).logits, runs.logits[0], rtol=0, atol=1e-4)

    def test_it_is_merged_right_where_the_run_has_lost_its_settings(self, trained: Any, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        taken_out(trained("loftq").whole, tmp_path / "run" / "model")
        export.merge(tmp_path / "run", tmp_path / "merged")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            found = whole(input_ids=IDS).logits
        torch.testing.assert_close(found, trained("loftq").logits[0], rtol=0, atol=1e-4)

    def test_it_says_so_to_its_readers(self, trained: Any, tmp_path: Path) -> None:
        runs = trained("loftq")
        export.export(runs.whole, tmp_path / "alone", format="adapter")
        for folder in (runs.whole / "model", tmp_path / "alone"):
            said = (folder / "README.md").read_text()
            assert said.count("is wrong on the weights as they are") == 1
            assert "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4'" in said
            assert rounding_of(folder) == of_run(runs.whole).quantization
        assert rounding_of(trained("qlora").whole / "model") is None
        assert not (trained("qlora").whole / "model" / "README.md").read_text().count("wrong on the weights")

    @pytest.mark.parametrize("where", ["model", "checkpoints/checkpoint-2"])
    @pytest.mark.parametrize("tuning", [{"method": "lora"}, {"method": "qlora", "bnb_4bit_quant_type": "fp4"}], ids=str)
    def test_it_is_not_trained_on_elsewhere(
        self, where: str, tuning: dict[str, Any], trained: Any, tiny_model: Path, rows: Path, tmp_path: Path
    ) -> None:
        values = {**tuning, "adapter": str(trained("loftq").whole / where)}
        with pytest.raises(RecipeError) as caught:
            ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=values))
        assert caught.value.problems[0].rule == "adapter-rounding"
        assert "load_in_4bit: true, bnb_4bit_quant_type: nf4" in caught.value.problems[0].fix

    def test_what_goes_on_belongs_there_too(self, trained: Any, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        before = trained("loftq").whole / "model"
        tuning = {"method": "qlora", "adapter": str(before)}
        settings = {"max_steps": 2, "learning_rate": 1e-30}
        ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning, training=settings))
        assert rounding_of(tmp_path / "run" / "model") == rounding_of(before)
        again = load_finished(of_run(tmp_path / "run"), dtype="float32")
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=IDS).logits, trained("loftq").logits[0], rtol=0, atol=1e-4)


def test_an_adapter_goes_on_upon_its_own_base_alone(trained: Any, make_tiny: Any, rows: Path, tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "other", seed=5)
    tuning = {"method": "lora", "adapter": str(trained("qlora").whole / "model")}
    with pytest.raises(RunError) as caught:
        ftune.train(recipe(other, rows, tmp_path / "run", tuning=tuning))
    assert caught.value.problems[0].rule == "base-differs"


class TestQuantisedBases:
    @pytest.fixture(scope="class")
    def quantised(self, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Return a folder with the tiny model, saved in 4 bits."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("bits") / "model")
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=bits).save_pretrained(folder)
        return Path(folder)

    @pytest.mark.parametrize(
        ("method", "said"),
        [
            *((method, "cannot move") for method in ("full", "hift", "lisa", "badam", "lora_and_full")),
            ("qlora", "quantised already"),
        ],
    )
    def test_refused_where_they_cannot_be_trained(
        self, method: str, said: str, quantised: Path, rows: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(RecipeError, match=said) as caught:
            ftune.train(recipe(quantised, rows, tmp_path / "run", tuning={"method": method}))
        assert "lora" in caught.value.problems[0].fix
        assert not (tmp_path / "run").exists()

    def test_check_says_so(self, quantised: Path, rows: Path, tmp_path: Path, ftune: Any) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(quantised, rows, tmp_path / "run", tuning={"method": "full"})))
        done = ftune("check", path)
        assert done.returncode == 2
        assert "base-quantised" in done.stderr + done.stdout

    def test_carry_an_adapter(self, quantised: Path, rows: Path, tmp_path: Path) -> None:
        settings = {"max_steps": 3, "learning_rate": 3e-3}
        done = ftune.train(recipe(quantised, rows, tmp_path / "run", tuning={"method": "lora"}, training=settings))
        assert done.steps == 3
        assert load_finished(of_run(tmp_path / "run")).get_base_model().is_loaded_in_4bit


class TestGoingOn:
    def test_an_adapter_is_trained_on(self, trained: Any, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        """With nothing learned in between, the first loss is that of the adapter."""
        from peft import PeftConfig

        before = trained("eva")
        settings = {"max_steps": 2, "learning_rate": 1e-30}
        tuning = {"method": "lora", "adapter": str(before.whole / "model")}
        done = ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning, training=settings))
        assert same_bits(weights(before.whole), weights(done.directory))
        assert PeftConfig.from_pretrained(tmp_path / "run" / "model").rank_pattern
        spec = json.loads((tmp_path / "run" / "run.json").read_text())
        assert spec["recipe"]["tuning"]["r"] == 4
        assert spec["recipe"]["tuning"]["rank_pattern"]

    def test_a_pickled_one_is_refused(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        adapted = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        get_peft_model(make_model(), adapted).save_pretrained(tmp_path / "adapter")
        stored = tmp_path / "adapter" / "adapter_model.safetensors"
        torch.save(load_file(stored), stored.with_suffix(".bin"))
        stored.unlink()
        tuning = {"method": "lora", "adapter": str(tmp_path / "adapter")}
        with pytest.raises(RecipeError, match=r"holds no adapter_model\.safetensors"):
            ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning))

    def test_to_the_same_bits_after_a_stop(self, trained: Any, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        tuning = {"method": "lora", "adapter": str(trained("pissa").whole / "model")}
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        done = ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning, training=settings))
        stopped = shutil.copytree(done.directory, tmp_path / "stopped")
        shutil.rmtree(stopped / "model")
        shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
        (stopped / "result.json").unlink()
        continued = resuming.reopen(stopped, (), probe())
        run.train(continued.spec, checkpoint=continued.checkpoint)
        assert same_bits(weights(done.directory), weights(stopped))
        assert not same_bits(weights(done.directory), weights(trained("pissa").whole))

    def test_an_adapter_made_elsewhere(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        config.trainable_token_indices = {"embed_tokens": [7]}  # which no recipe can say
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "theirs")
        tuning = {"method": "qlora", "adapter": str(tmp_path / "theirs"), "r": 3}
        done = ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning, training={"max_steps": 2}))
        assert len(weights(done.directory)) == 9
        assert export.merge(tmp_path / "run", tmp_path / "merged").max_difference < 1e-3

    def test_another_shape_is_refused(self, trained: Any, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        tuning = {"method": "lora", "adapter": str(trained("eva").whole / "model"), "r": 16}
        with pytest.raises(RecipeError, match="made with r: 4"):
            ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning))

    def test_a_folder_without_an_adapter_is_refused(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        tuning = {"method": "lora", "adapter": str(tiny_model)}
        with pytest.raises(RecipeError, match=r"holds no adapter_config\.json"):
            ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning))

    def test_one_of_another_method_is_refused(self, trained: Any, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        tuning = {"method": "lora", "adapter": str(trained("vera").whole / "model")}
        with pytest.raises(RecipeError, match="another method, VERA"):
            ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning))

    def test_one_that_changed_its_base_is_refused(
        self, trained: Any, tiny_model: Path, rows: Path, tmp_path: Path
    ) -> None:
        """A checkpoint holds a PiSSA adapter as it is trained, for the base it took its beginning out of."""
        tuning = {"method": "lora", "adapter": str(trained("pissa").whole / "checkpoints" / "checkpoint-4")}
        with pytest.raises(RecipeError, match="a base that pissa changed"):
            ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning))


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ({"exclude_modules": ["q_prj"]}, "did you mean q_proj"),
        ({"exclude_modules": "nothing.*"}, "matches no layer"),
        ({"rank_pattern": {"q_prj": 4}}, "matches no layer"),
        ({"target_modules": "nothing.*"}, "linear layers are"),
        ({"layers_to_transform": [2]}, "numbered 0 to 1"),
        ({"layers_pattern": "layers"}, "set layers_to_transform"),
        ({"layers_to_transform": [1], "target_modules": ["model.layers.0.mlp.up_proj"]}, "would be ignored"),
        ({"trainable_token_indices": [260]}, "numbered 0 to 259"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "does not go with use_dora"),
        ({"init_lora_weights": "eva", "r": 30000}, "eva_rho"),
        ({"init_lora_weights": "orthogonal", "r": 5}, "even"),
        ({"method": "qlora", "modules_to_save": ["q_proj"]}, "is quantised"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_what_can(
    tuning: dict[str, Any], said: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning={"method": "lora", **tuning}))
    (problem,) = caught.value.problems
    assert said in f"{problem.what} {problem.why} {problem.fix}"


@pytest.mark.parametrize("name", ["qlora", pytest.param("eva", marks=slow)])
def test_two_ranks_are_one_with_both_halves(name: str, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    tuning = {**CASES[name], "lora_dropout": 0.0}
    settings = {"max_steps": 3, "optim": "sgd"}
    alone = recipe(
        tiny_model, rows, tmp_path / "one", tuning=tuning, training={**settings, "per_device_train_batch_size": 8}
    )
    values = recipe(tiny_model, rows, tmp_path / "two", tuning=tuning, training=settings)
    if name == "eva":  # what it looks at are batches of one rank
        alone = values | {"training": {**values["training"], "output_dir": str(tmp_path / "one")}}
        alone["training"]["gradient_accumulation_steps"] = 2
    one = ftune.train(alone).directory
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python"]
    command += [sys.executable, "-m", "ftune", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-6)
    for key, weight in weights(one).items():
        torch.testing.assert_close(weights(tmp_path / "two")[key], weight, rtol=1e-5, atol=1e-6)
