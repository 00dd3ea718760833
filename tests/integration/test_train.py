"""`ftune train` as a user meets it: what is left behind, what is refused, what is said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_runs import losses, metrics, recipe, rows_file, same_bits, weights

import ftune
from ftune.errors import MachineError, RunError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 32)


def written(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class TestWhatIsLeftBehind:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path, ftune: Any) -> Any:
        folder = tmp_path_factory.mktemp("left")
        settings = {"save_strategy": "epoch", "num_train_epochs": 2, "sample_prompts": None, "sample_max_new_tokens": 8}
        values = recipe(tiny_model, rows, folder / "run", data={"eval": 0.2}, training=settings)
        path = written(folder, values)
        done = ftune("train", path, "--set", "training.weight_decay=0.01")
        assert done.returncode == 0, done.stderr
        return folder / "run", path, done

    def test_recipe_is_kept_byte_for_byte(self, run: Any) -> None:
        directory, path, _ = run
        assert (directory / "recipe.yaml").read_bytes() == path.read_bytes()
        assert yaml.safe_load((directory / "overrides.yaml").read_text()) == ["training.weight_decay=0.01"]

    def test_run_json_says_everything_decided(self, run: Any) -> None:
        spec = json.loads((run[0] / "run.json").read_text())
        assert "auto" not in [value for section in spec["recipe"].values() for value in section.values()]
        assert {"key", "value", "why", "by"} == set(spec["decisions"][0])
        assert spec["seed"] == 42
        assert spec["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert [len(digest) for digest in spec["data_fingerprint"].values()] == [64]

    def test_metrics_have_the_promised_keys(self, run: Any) -> None:
        lines = metrics(run[0])
        trained = [line for line in lines if "loss" in line]
        keys = (
            "step epoch loss learning_rate grad_norm tokens supervised_tokens tokens_per_second peak_memory_bytes time"
        )
        assert set(trained[0]) == set(keys.split())
        assert [line["step"] for line in lines if "eval_loss" in line] == [0, 7, 14]
        assert [line["step"] for line in trained] == list(range(1, 15))

    def test_result_has_the_promised_keys(self, run: Any) -> None:
        result = json.loads((run[0] / "result.json").read_text())
        keys = (
            "status steps train_loss eval_loss tokens supervised_tokens tokens_per_second wall_seconds "
            "peak_memory_bytes predicted_peak_bytes best_checkpoint"
        )
        assert set(result) == set(keys.split())
        assert result["status"] == "finished"
        assert (run[0] / result["best_checkpoint"]).is_dir()

    def test_model_loads_with_plain_transformers(self, run: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(run[0] / "model")
        tokenizer = AutoTokenizer.from_pretrained(run[0] / "model")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert model(**tokenizer(text, return_tensors="pt")).logits.isfinite().all()
        assert model.config.use_cache

    def test_samples_before_during_and_after(self, run: Any) -> None:
        lines = [json.loads(line) for line in (run[0] / "samples.jsonl").read_text().splitlines()]
        assert [line["when"] for line in lines] == ["before"] * 3 + ["during"] * 3 + ["after"] * 3
        assert {"step", "when", "prompt", "answer"} == set(lines[0])

    def test_plain_lines_where_there_is_no_terminal(self, run: Any) -> None:
        output = run[2].stdout
        assert "step 1/14  loss " in output
        assert "eval_loss" in output
        assert "\x1b[" not in output
        assert "\r" not in output
        assert "training.max_grad_norm" in output
        said = re.search(
            r"train: \d+ messages rows.* a row has p50 (\d+), p95 (\d+), p99 (\d+), at most (\d+)\n", output
        )
        assert said is not None
        assert sorted(map(int, said.groups())) == list(map(int, said.groups()))
        padded = re.search(r"train: ([\d.]+)% of the places in a batch are padding", output)
        assert padded is not None
        assert 0 < float(padded[1]) < 60
        assert not run[2].stderr.strip(), run[2].stderr


@pytest.mark.parametrize("schedule", ["cosine", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay"])
def test_schedules(schedule: str, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    arguments = {"cosine_with_min_lr": {"min_lr": 1e-5}, "warmup_stable_decay": {"num_decay_steps": 2}}
    settings = {
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": arguments.get(schedule, {}),
        "warmup_steps": 0.25,
        "max_steps": 8,
    }
    run = ftune.train(recipe(tiny_model, rows, tmp_path / "run", training=settings))
    rates = [line["learning_rate"] for line in metrics(run.directory)]
    assert rates[:3] == [0.0, 5e-4, 1e-3]
    assert max(rates) == 1e-3


class TestLoRA:
    def test_only_the_adapter_moves(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM

        tuning = {"method": "lora", "r": 4, "modules_to_save": ["lm_head"]}
        run = ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning))
        model = AutoPeftModelForCausalLM.from_pretrained(Path(run.directory) / "model")
        base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
        found = model.get_base_model().state_dict()
        for name, weight in base.items():
            inner = name.replace(".weight", ".base_layer.weight")
            if name == "lm_head.weight":
                moved = found["lm_head.modules_to_save.default.weight"]
                assert not torch.equal(moved, weight)
            else:
                assert torch.equal(found.get(inner, found.get(name)), weight), name
        assert any(weight.abs().sum() > 0 for name, weight in found.items() if "lora_B" in name)

    @pytest.mark.parametrize("extra", [{"use_rslora": True}, {"use_dora": True}, {"target_modules": "all-linear"}])
    def test_variants_learn(self, extra: dict[str, Any], tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        settings = {"learning_rate": 1e-2, "num_train_epochs": 2, "gradient_checkpointing": True}
        tuning = {"method": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"], **extra}
        run = ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning=tuning, training=settings))
        found = losses(run.directory)
        assert sum(found[-4:]) < sum(found[:4])

    def test_targets_that_are_not_there_list_what_is(
        self, tiny_model: Path, rows: Path, tmp_path: Path, ftune: Any
    ) -> None:
        values = recipe(tiny_model, rows, tmp_path / "run", tuning={"method": "lora", "target_modules": ["query"]})
        done = ftune("train", written(tmp_path, values))
        assert done.returncode == 2
        assert "q_proj" in done.stderr


class TestPrecision:
    def test_bf16_autocast_is_what_runs(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        runs = [
            ftune.train(recipe(tiny_model, rows, tmp_path / str(on), training={"bf16": on, "max_steps": 2}))
            for on in (False, True)
        ]
        first, second = (losses(run.directory)[0] for run in runs)
        assert first != second
        assert first == pytest.approx(second, rel=2e-2)
        assert {weight.dtype for weight in weights(runs[1].directory).values()} == {torch.float32}

    def test_pure_bf16_weights(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        values = recipe(tiny_model, rows, tmp_path / "run", model={"dtype": "bfloat16"}, training={"max_steps": 2})
        values["training"]["bf16"] = "auto"
        run = ftune.train(values)
        assert {weight.dtype for weight in weights(run.directory).values()} == {torch.bfloat16}
        spec = json.loads((Path(run.directory) / "run.json").read_text())
        assert spec["recipe"]["training"]["bf16"] is False

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes float16")
    def test_fp16_on_a_cpu_is_refused(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        with pytest.raises(MachineError, match="fp16 cannot run on a CPU"):
            ftune.train(recipe(tiny_model, rows, tmp_path / "run", training={"fp16": True}))

    def test_compiled_model_has_the_same_losses(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        runs = [
            ftune.train(recipe(tiny_model, rows, tmp_path / str(on), training={"torch_compile": on, "max_steps": 2}))
            for on in (False, True)
        ]
        assert losses(runs[1].directory) == pytest.approx(losses(runs[0].directory), rel=1e-4)


def test_a_loss_that_is_not_a_number_stops_the_run(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e30, "max_grad_norm": 0, "optim": "sgd", "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(RunError, match="the loss is not a number") as caught:
        ftune.train(recipe(tiny_model, rows, tmp_path / "run", training=settings))
    assert caught.value.exit_code == 5
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert 0.0 not in losses(tmp_path / "run")


def test_weights_that_are_not_numbers_are_not_saved(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """The last update of a run is in no loss: here 0 / 0 for rows of the embedding that no batch has."""
    settings = {"optim": "adamw_torch", "optim_args": {"eps": 0}, "max_steps": 1}
    with pytest.raises(RunError, match="weights are not numbers"):
        ftune.train(recipe(tiny_model, rows, tmp_path / "run", training=settings))
    assert not (tmp_path / "run" / "model").exists()


class TestEvaluation:
    @pytest.mark.parametrize("method", ["full", "lora"])
    @pytest.mark.parametrize("saved", [{"save_strategy": "epoch"}, {"save_strategy": "steps", "save_steps": 1000}])
    def test_early_stopping_ends_with_the_best(
        self, saved: dict[str, Any], method: str, tiny_model: Path, rows: Path, tmp_path: Path
    ) -> None:
        from safetensors.torch import load_file

        other = rows_file(tmp_path / "other.jsonl", 8, source=ROOT / "recipes" / "data" / "definitions.eval.jsonl")
        settings = {
            "num_train_epochs": 40,
            "learning_rate": 0.02,
            "early_stopping_patience": 2,
            "load_best_model_at_end": True,
            "save_total_limit": 1,
            **saved,
        }
        tuning = {"method": method}
        values = recipe(tiny_model, rows, tmp_path / "run", data={"eval": str(other)}, tuning=tuning, training=settings)
        run = ftune.train(values)
        found = [(line["eval_loss"], line["step"]) for line in metrics(run.directory) if "eval_loss" in line]
        best, step = min(found)
        assert run.steps < 40 * 8
        assert step < run.steps
        assert run.best_checkpoint == f"checkpoints/checkpoint-{step}"
        assert run.eval_loss == pytest.approx(best, rel=1e-6)
        (kept,) = (tmp_path / "run" / run.best_checkpoint).glob("*model.safetensors")
        assert same_bits(weights(run.directory), load_file(kept))
        # What was saved is judged anew, by a run that learns nothing.
        start = {"learning_rate": 1e-30, "max_steps": 1}
        if method == "full":
            model = tmp_path / "run" / "model"
            again = ftune.train(recipe(model, rows, tmp_path / "again", data={"eval": str(other)}, training=start))
            assert metrics(again.directory)[0]["eval_loss"] == pytest.approx(best, rel=1e-5)

    def test_evaluation_by_steps(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        values = recipe(tiny_model, rows, tmp_path / "run", data={"eval": 0.25}, training={"eval_steps": 2})
        run = ftune.train(values)
        assert [line["step"] for line in metrics(run.directory) if "eval_loss" in line] == [0, 2, 4, 6]


class TestData:
    def test_pretraining_learns_plain_text_in_pieces(self, tiny_model: Path, tmp_path: Path) -> None:
        text = tmp_path / "book.txt"
        text.write_text("It was a dark and stormy night, and the rain fell in torrents. " * 30)
        values = recipe(tiny_model, text, tmp_path / "run", data={"max_length": 100}, objective={"method": "pretrain"})
        run = ftune.train(values)
        # Bytes and the end mark in pieces of 100; the first token of each piece is not predicted.
        count = len(text.read_text().strip()) + 1
        pieces = -(-count // 100)
        assert abs(run.tokens - count) <= 1
        assert run.supervised_tokens == run.tokens - pieces

    def test_pretraining_refuses_conversations(self, tiny_model: Path, rows: Path, tmp_path: Path, ftune: Any) -> None:
        done = ftune(
            "train", written(tmp_path, recipe(tiny_model, rows, tmp_path / "run", objective={"method": "pretrain"}))
        )
        assert done.returncode == 4
        assert "Traceback" not in done.stderr

    def test_streamed_rows_train(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        values = recipe(
            tiny_model,
            rows,
            tmp_path / "run",
            data={"streaming": True, "shuffle_buffer_size": 8},
            training={"max_steps": 12},
        )
        run = ftune.train(values)
        assert run.steps == 12
        again = ftune.train({**values, "training": {**values["training"], "output_dir": str(tmp_path / "again")}})
        assert losses(again.directory) == losses(run.directory)

    def test_loader_workers_change_nothing(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        plain = ftune.train(recipe(tiny_model, rows, tmp_path / "plain"))
        settings = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2}
        workers = ftune.train(recipe(tiny_model, rows, tmp_path / "workers", training=settings))
        assert losses(workers.directory) == losses(plain.directory)


BAD_DATA = {
    "bad json": ("{nope\n", "1234"),
    "other column": (json.dumps({"mesages": []}) + "\n", "1234"),
    "wrong role": (json.dumps({"messages": [{"role": "robot", "content": "x"}, {"content": "y"}]}) + "\n", "1234"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_a_bad_row_is_named(kind: str, tiny_model: Path, rows: Path, tmp_path: Path, ftune: Any) -> None:
    line, number = BAD_DATA[kind]
    good = rows.read_text().splitlines()[0] + "\n"
    path = tmp_path / "rows.jsonl"
    path.write_text(good * 1233 + line + good)
    done = ftune("train", written(tmp_path, recipe(tiny_model, path, tmp_path / "run")))
    assert done.returncode == 4, done.stderr
    assert f"rows.jsonl:{number}" in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 24


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"model": {"model_name_or_path": "./no-such-model"}}, 2, "no-such-model"),
        ({"model": {"model_name_or_path": "nobody/no-such-model"}}, 2, "nobody/no-such-model"),
        ({"data": {"train": "rows.jsnl"}}, 4, "rows.jsnl"),
        ({"data": {"train": "missing.jsonl"}}, 4, "missing.jsonl"),
        ({"training": {"learning_rate": "abc"}}, 2, "learning_rate"),
        ({"training": {"fp16": True, "bf16": True}}, 2, "bf16 and fp16 cannot both be on"),
        ({"training": {"output_dir": "/proc/nowhere"}}, 5, "/proc/nowhere"),
    ],
)
def test_errors_fit_one_screen(
    change: dict[str, Any], code: int, said: str, tiny_model: Path, rows: Path, tmp_path: Path, ftune: Any
) -> None:
    done = ftune("train", written(tmp_path, recipe(tiny_model, rows, tmp_path / "run", **change)))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 24
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_encoder_is_not_a_causal_model(rows: Path, tmp_path: Path, tiny_model: Path, ftune: Any) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=260, **shape)).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "bert")
    done = ftune("train", written(tmp_path, recipe(tmp_path / "bert", rows, tmp_path / "run")))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


class TestTwoRanks:
    """Two processes on gloo, started as torchrun starts them, against one process with the same global batch."""

    def launch(self, path: Path, *more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--standalone",
            "--no-python",
        ]
        command = [*launcher, sys.executable, "-m", "ftune", *more, str(path)]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    def test_equal_one_process(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        shared = {"optim": "sgd", "num_train_epochs": 1}
        alone = ftune.train(
            recipe(
                tiny_model,
                rows,
                tmp_path / "one",
                data={"eval": str(rows)},
                training={**shared, "per_device_train_batch_size": 8},
            )
        )
        values = recipe(
            tiny_model,
            rows,
            tmp_path / "two",
            data={"eval": str(rows)},
            training={
                **shared,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "save_strategy": "steps",
                "save_steps": 2,
            },
        )
        done = self.launch(written(tmp_path, values), "train")
        assert done.returncode == 0, done.stdout + done.stderr
        assert losses(tmp_path / "two") == pytest.approx(losses(alone.directory), rel=1e-6)
        for name, weight in weights(alone.directory).items():
            torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=1e-6, atol=1e-7)
        result = json.loads((tmp_path / "two" / "result.json").read_text())
        assert result["tokens"] == alone.tokens
        assert result["eval_loss"] == pytest.approx(alone.eval_loss, rel=1e-6)
        assert result["supervised_tokens"] == alone.supervised_tokens

    @pytest.mark.parametrize("packing", [False, True])
    def test_a_stream_is_shared_out_without_overlap(
        self, packing: bool, tiny_model: Path, rows: Path, tmp_path: Path
    ) -> None:
        data = {"streaming": True, "shuffle_buffer_size": 8, "packing": packing}
        settings = {"optim": "sgd", "max_steps": 9}
        one = {**settings, "per_device_train_batch_size": 4}
        alone = ftune.train(recipe(tiny_model, rows, tmp_path / "one", data=data, training=one))
        two = {**settings, "per_device_train_batch_size": 2}
        values = recipe(tiny_model, rows, tmp_path / "two", data=data, training=two)
        done = self.launch(written(tmp_path, values), "train")
        assert done.returncode == 0, done.stdout + done.stderr
        assert losses(tmp_path / "two") == pytest.approx(losses(alone.directory), rel=1e-6)

    @pytest.mark.parametrize("settings", [{"group_by_length": True}, {"max_tokens_per_batch": 400}], ids=str)
    def test_planned_batches_are_shared_out(
        self, settings: dict[str, Any], tiny_model: Path, rows: Path, tmp_path: Path
    ) -> None:
        values = recipe(tiny_model, rows, tmp_path / "two", training=settings)
        if "max_tokens_per_batch" in settings:
            del values["training"]["per_device_train_batch_size"]
        done = self.launch(written(tmp_path, values), "train")
        assert done.returncode == 0, done.stdout + done.stderr
        alone = ftune.train(recipe(tiny_model, rows, tmp_path / "one"))
        result = json.loads((tmp_path / "two" / "result.json").read_text())
        assert result["supervised_tokens"] == alone.supervised_tokens

    def test_resume_to_the_same_bits(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        import shutil

        settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
        values = recipe(
            tiny_model, rows, tmp_path / "run", tuning={"method": "lora", "lora_dropout": 0.2}, training=settings
        )
        first = self.launch(written(tmp_path, values), "train")
        assert first.returncode == 0, first.stderr
        assert "find_unused_parameters" not in first.stderr
        copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
        shutil.rmtree(copy / "model")
        shutil.rmtree(copy / "checkpoints" / "checkpoint-4")
        (copy / "result.json").unlink()
        done = self.launch(copy, "resume")
        assert done.returncode == 0, done.stdout + done.stderr
        assert same_bits(weights(copy), weights(tmp_path / "run"))
        assert losses(copy) == losses(tmp_path / "run")
