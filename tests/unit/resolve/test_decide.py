"""Every `auto` is settled, with a reason, and never against a rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftune.errors import RecipeError
from ftune.machine import Gpu, Machine
from ftune.recipe import load
from ftune.resolve import RunSpec, check_later, findings, resolve
from ftune.rules import RULES
from ftune.rules.check import broken, example
from ftune.rules.rule import Facts

_PACKAGES = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1.0")


def gpu(name: str, capability: tuple[int, int]) -> Gpu:
    return Gpu(name, 16 * 2**30, capability)


MACHINES = {
    "H100": Machine((gpu("H100", (9, 0)),), packages=_PACKAGES),
    "H100 with flash-attn": Machine((gpu("H100", (9, 0)),), packages={**_PACKAGES, "flash_attn": "2"}),
    "T4": Machine((gpu("T4", (7, 5)),), packages=_PACKAGES),
    "T4 with flash-attn": Machine((gpu("T4", (7, 5)),), packages={**_PACKAGES, "flash_attn": "2"}),
    "V100": Machine((gpu("V100", (7, 0)),), packages=_PACKAGES),
    "H100 beside a V100": Machine((gpu("H100", (9, 0)), gpu("V100", (7, 0))), packages=_PACKAGES),
    "CPU": Machine(packages=_PACKAGES),
    "CPU with bf16": Machine(cpu_flags=frozenset({"amx_bf16"}), packages=_PACKAGES),
}


def settled(machine: str, changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec = resolve(example(changes), MACHINES[machine])
    assert all(decision.why for decision in spec.decisions)
    return {decision.key: decision.value for decision in spec.decisions}


@pytest.mark.parametrize(
    ("machine", "method", "bf16", "fp16", "dtype", "attention"),
    [
        ("H100", "full", True, False, "float32", "sdpa"),
        ("H100", "lora", True, False, "bfloat16", "sdpa"),
        ("H100 with flash-attn", "lora", True, False, "bfloat16", "flash_attention_2"),
        ("T4", "full", False, True, "float32", "sdpa"),
        ("T4", "lora", False, True, "float16", "sdpa"),
        ("T4 with flash-attn", "lora", False, True, "float16", "sdpa"),
        ("V100", "lora", False, True, "float16", "sdpa"),
        ("H100 beside a V100", "lora", False, True, "float16", "sdpa"),
        ("CPU", "full", False, False, "float32", "sdpa"),
        ("CPU", "lora", False, False, "float32", "sdpa"),
        ("CPU with bf16", "full", True, False, "float32", "sdpa"),
        ("CPU with bf16", "lora", True, False, "bfloat16", "sdpa"),
    ],
)
def test_precision(machine: str, method: str, bf16: bool, fp16: bool, dtype: str, attention: str) -> None:
    values = settled(machine, {"tuning": {"method": method}})
    assert (values["training.bf16"], values["training.fp16"]) == (bf16, fp16)
    assert (values["model.dtype"], values["model.attn_implementation"]) == (dtype, attention)
    assert values["training.tf32"] is (machine in ("H100", "H100 with flash-attn"))
    assert values["training.dataloader_pin_memory"] is ("CPU" not in machine)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"training": {"fp16": True}}, "training.bf16", False),
        ({"training": {"bf16": False}}, "training.fp16", False),
        ({"model": {"dtype": "bfloat16"}}, "training.bf16", False),
        ({"model": {"dtype": "float16"}, "tuning": {"method": "lora"}}, "training.bf16", False),
        ({"model": {"dtype": "float16"}, "tuning": {"method": "lora"}}, "training.fp16", True),
        ({"training": {"bf16": False}, "tuning": {"method": "lora"}}, "model.dtype", "float32"),
        ({}, "training.learning_rate", 5e-5),
        ({"tuning": {"method": "lora"}}, "training.learning_rate", 2e-4),
        ({"training": {"optim": "sgd"}}, "training.learning_rate", 1e-2),
        ({"training": {"optim": "sgd"}, "tuning": {"method": "lora"}}, "training.learning_rate", 4e-2),
        ({}, "training.max_grad_norm", 1.0),
        ({"training": {"optim": "adafactor"}}, "training.max_grad_norm", 0.0),
        ({}, "training.eval_strategy", "no"),
        ({"data": {"eval": 0.1}}, "training.eval_strategy", "epoch"),
        ({"data": {"eval": 0.1}, "training": {"eval_steps": 10}}, "training.eval_strategy", "steps"),
    ],
)  # fmt: skip
def test_choices_on_an_h100(changes: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    assert settled("H100", changes)[key] == (pytest.approx(value) if isinstance(value, float) else value)


def test_rows_are_left_to_the_plan() -> None:
    training = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 4}
    spec = resolve(example({"training": training}), MACHINES["H100"])
    (left,) = (decision for decision in spec.decisions if decision.key == "training.per_device_train_batch_size")
    assert left.value == "auto"
    assert "the plan decides: as many of the 32 rows of a step" in left.why
    assert RunSpec.from_json(spec.to_json()) == spec


def test_the_recipe_has_the_say() -> None:
    said = {"bf16": True, "fp16": False, "tf32": False, "learning_rate": 1.0, "max_grad_norm": 3, "eval_strategy": "no"}
    training = {**said, "dataloader_pin_memory": False}
    values = settled("T4", {"training": training, "model": {"dtype": "float32"}, "data": {"num_proc": 3}})
    assert set(values) <= {"model.attn_implementation", "distributed.engine"}


_RECIPES = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"dtype": st.sampled_from(["auto", "auto", "float32", "bfloat16", "float16"])},
            optional={"attn_implementation": st.sampled_from(["auto", "eager", "sdpa", "flash_attention_2"])},
        ),
        "tuning": st.sampled_from([{"method": "full"}, {"method": "lora"}]),
        "data": st.fixed_dictionaries({}, optional={"eval": st.just(0.1), "format": st.just("messages")}),
        "training": st.fixed_dictionaries(
            {},
            optional={
                "bf16": st.sampled_from(["auto", True, False]),
                "fp16": st.sampled_from(["auto", True, False]),
                "optim": st.sampled_from(["adamw_torch", "sgd", "adafactor", "adamw_8bit"]),
                "eval_steps": st.just(10),
                "lr_scheduler_type": st.sampled_from(["linear", "polynomial"]),
            },
        ),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(MACHINES)), _RECIPES)
def test_no_choice_breaks_a_rule(machine: str, changes: dict[str, dict[str, Any]]) -> None:
    loaded = example(changes)
    if any(problem.severity == "error" for problem in findings(loaded, MACHINES[machine])):
        return
    spec = resolve(loaded, MACHINES[machine])
    assert [
        rule.id for rule in RULES if rule.severity == "error" and broken(rule, Facts(spec.recipe, MACHINES[machine]))
    ] == []
    assert "auto" not in _settled_values(spec)
    assert RunSpec.from_json(spec.to_json()) == spec


def _settled_values(spec: RunSpec) -> list[Any]:
    """The values that must be settled; prompts and the format are looked for in the data."""
    later = {"sample_prompts", "format"}
    sections = spec.recipe.as_dict().values()
    return [value for section in sections for key, value in section.items() if key not in later]


def test_run_spec_survives_json() -> None:
    changes = {"tuning": {"method": "lora", "target_modules": ["q"]}, "training": {"optim_args": {"betas": [0.8, 0.9]}}}
    spec = resolve(example(changes), MACHINES["H100"])
    again = RunSpec.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()


@pytest.fixture
def gguf_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("first", "second", "third"):
        (tmp_path / folder).mkdir()
    for folder in ("first", "third"):
        (tmp_path / folder / "weights.gguf").touch()
    (tmp_path / "train.jsonl").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {model_name_or_path: ./first, gguf_file: weights.gguf}\ndata: {train: train.jsonl}\n"
        "training: {output_dir: o}\n",
        encoding="utf-8",
    )
    return recipe


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], True),
        (["training.seed=1"], True),
        (["model.model_name_or_path=./second"], False),
        (["model.model_name_or_path=some/hub-name"], False),
        (["model.model_name_or_path=./third"], True),
        (["model.model_name_or_path=./first"], True),
        (["model.model_name_or_path=./second", "model.gguf_file=weights.gguf"], True),
    ],
)
def test_a_gguf_goes_with_the_model_it_belongs_to(arguments: list[str], kept: bool, gguf_recipe: Path) -> None:
    spec = resolve(load(gguf_recipe, arguments), MACHINES["CPU"])
    assert (spec.recipe.model.gguf_file == "weights.gguf") is kept
    assert any(decision.key == "model.gguf_file" for decision in spec.decisions) is not kept


def test_a_package_named_again_keeps_its_gguf(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {model_name_or_path: 'package:some_package', gguf_file: w.gguf}\ndata: {train: some/data}\n"
        "training: {output_dir: o}\n",
        encoding="utf-8",
    )
    spec = resolve(load(recipe, ["model.model_name_or_path=package:some_package"]), MACHINES["CPU"])
    assert spec.recipe.model.gguf_file == "w.gguf"


def test_paths_are_found_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "train.jsonl").write_text("{}", encoding="utf-8")
    (tmp_path / "eval.jsonl").write_text("{}", encoding="utf-8")
    recipe = tmp_path / "recipes" / "recipe.yaml"
    recipe.write_text(
        "model: {model_name_or_path: m}\ndata: {train: train.jsonl, eval: [eval.jsonl]}\ntraining: {output_dir: o}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    spec = resolve(load(recipe), MACHINES["CPU"])
    assert spec.recipe.data.train == str(tmp_path / "recipes" / "train.jsonl")
    assert spec.recipe.data.eval == [str(tmp_path / "eval.jsonl")]
    why = {decision.key: decision.why for decision in spec.decisions}
    assert (why["data.train"], why["data.eval"]) == ("found beside the recipe", "found from here")
    assert spec.recipe.training.output_dir == str(tmp_path / "o")
    assert set(spec.data_fingerprint) == {spec.recipe.data.train, *spec.recipe.data.eval}


@pytest.mark.parametrize(
    ("asked", "trackers"),
    [("none", []), (["none"], []), (["none", "none"], []), (["none", "wandb"], ["wandb"]), ("wandb", ["wandb"])],
)
def test_none_is_no_tracker(asked: str | list[str], trackers: list[str]) -> None:
    spec = resolve(example({"training": {"report_to": asked}}), MACHINES["CPU"])
    assert spec.training_arguments["report_to"] == trackers


def test_what_a_run_finds_out_can_be_wrong_or_odd() -> None:
    changes = {"data": {"assistant_only_loss": False, "chat_template": "chat.jinja"}}
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 100}}
    spec = resolve(example({**changes, "training": {**schedule, "num_train_epochs": 1}}), MACHINES["CPU"])
    said: list[str] = []
    check_later(spec, "data.format", "messages", said.append)
    check_later(spec, "training.max_steps", 100, said.append)
    assert said == []
    check_later(spec, "data.format", "text", said.append)
    assert said[0].startswith("warning: recipe.yaml:")
    assert "chat_template would be ignored" in said[0]
    with pytest.raises(RecipeError, match="assistant_only_loss would be ignored: `prompt_completion` rows"):
        check_later(spec, "data.format", "prompt_completion", said.append)
    with pytest.raises(RecipeError, match="rises and falls over 100 steps and the run has 99"):
        check_later(spec, "training.max_steps", 99, said.append)


def test_what_set_gives_counts_when_the_format_is_found() -> None:
    base = {"model": {"model_name_or_path": "m"}, "data": {"train": "t"}, "training": {"output_dir": "o"}}
    spec = resolve(load(base, ["data.completion_only_loss=false"]), MACHINES["CPU"])
    with pytest.raises(RecipeError) as caught:
        check_later(spec, "data.format", "messages", print)
    assert str(caught.value.problems[0].where) == "--set #1"
