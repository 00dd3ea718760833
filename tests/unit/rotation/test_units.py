"""Every weight of every family in exactly one unit, found from the module tree alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_model
from training_runs import no_rows
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ftune import plugin
from ftune.errors import RecipeError
from ftune.rotation.optimizer import parts_of
from ftune.rotation.units import units_of

_SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 32},
    "qwen2": {"intermediate_size": 32, "tie_word_embeddings": True},
    "qwen3": {"intermediate_size": 32, "head_dim": 8},
    "mistral": {"intermediate_size": 32, "num_key_value_heads": 1},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 3},
    "gemma2": {"intermediate_size": 32, "head_dim": 8},
    "phi3": {"intermediate_size": 32, "pad_token_id": 0},
    "gpt_neox": {"intermediate_size": 32},
    "gpt2": {},
    "falcon": {},
    "bloom": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
}


def model_of(family: str) -> Any:
    config = CONFIG_MAPPING[family](**{**_SMALL, **_SHAPES[family]})
    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", _SHAPES)
def test_each_weight_is_in_one_unit(family: str) -> None:
    model = model_of(family)
    units = units_of(model)
    found = [id(weight) for unit in units.in_order for weight in unit.weights]
    assert sorted(found) == sorted(id(weight) for weight in model.parameters())
    assert [unit.name for unit in units.layers] == ["layer 0", "layer 1", "layer 2"]
    assert len({sum(weight.numel() for weight in unit.weights) for unit in units.layers}) == 1
    assert any(weight is model.get_input_embeddings().weight for weight in units.embedding.weights)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    head = units.embedding if tied else units.head
    assert any(weight is model.get_output_embeddings().weight for weight in head.weights)


def test_position_embeddings_go_with_the_embedding_and_the_final_norm_with_the_head() -> None:
    model = model_of("gpt2")
    units = units_of(model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {names[id(weight)] for weight in units.embedding.weights} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert {names[id(weight)] for weight in units.head.weights} == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_layers_are_found_inside_a_wrapped_model() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of("llama"), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    units = units_of(model)
    assert sum(len(unit.weights) for unit in units.in_order) == len(list(model.parameters()))
    names = {id(weight): name for name, weight in model.named_parameters()}
    for number, unit in enumerate(units.layers):
        own = {names[id(weight)] for weight in unit.weights}
        assert all(f".layers.{number}." in name for name in own)
        assert any("lora_A" in name for name in own)
    assert any("lora_embedding_A" in names[id(weight)] for weight in units.embedding.weights)


def test_a_layer_used_twice_counts_once() -> None:
    model = model_of("llama")
    model.model.layers[2] = model.model.layers[0]
    units = units_of(model)
    assert [len(unit.weights) for unit in units.layers] == [9, 9, 0]
    parts = parts_of(units.in_order, [{"params": list(model.parameters()), "weight_decay": 0.0}], torch.optim.AdamW)
    assert [part.name for part in parts] == ["embedding", "layer 0", "layer 1", "head"]


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"the layers of a Linear are not found.*ModuleList"):
        units_of(torch.nn.Linear(2, 2))


def test_frozen_weights_are_in_no_part_and_groups_keep_their_settings() -> None:
    model = model_of("gpt2")
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    frozen = decayed.pop(0)
    others = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    parts = parts_of(units_of(model).in_order, groups, torch.optim.AdamW)
    held = [weight for part in parts for weight in part.weights]
    assert len(held) == len(decayed) + len(others)
    assert all(weight is not frozen for weight in held)
    for part in parts:
        for group in part.shown:
            assert {weight.ndim > 1 for weight in group["params"]} == {group["weight_decay"] > 0}


SWEEPS: dict[str, tuple[dict[str, Any], int, str]] = {
    "hift": ({"group_size": 3}, 2, "tuning.group_size: 5"),
    "badam": ({"interval": 7, "include_head": True}, 4 * 7, ""),
    "lisa": ({"activated_layers": 2, "interval": 5}, 2 * 5, ""),
}


@pytest.mark.parametrize("method", SWEEPS)
def test_the_least_steps_that_give_every_weight_a_turn(method: str) -> None:
    """Of 3 layers, counted by making the steps."""
    options, steps, alone = SWEEPS[method]
    tuning = plugin.tuning(method)
    chosen = tuning.Options(**options)
    model = tuning.apply(make_model(num_hidden_layers=3), chosen, batches=no_rows)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    asked: dict[str, Any] = {"steps_per_epoch": 100}
    assert tuning.sweep(model, trained, chosen, steps=1, **asked) == (steps, alone)

    def moved_after(count: int, more: dict[str, Any]) -> int:
        model = make_model(num_hidden_layers=3)
        settled = tuning.Options(**{**options, **more})
        tuning.apply(model, settled, batches=no_rows)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        before = [weight.detach().clone() for weight in weights]

        def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return torch.optim.SGD(groups, lr=0.1)

        optimizer = tuning.rotating(model, [{"params": weights}], build, settled, seed=0, **asked)
        for _ in range(count):
            for weight in weights:
                weight.grad = torch.ones_like(weight) if weight.requires_grad else None
            optimizer.step()
        return sum(bool((one != other).any()) for one, other in zip(weights, before, strict=True))

    if method != "lisa":  # which leaves it to chance
        assert moved_after(steps, {}) == len(trained)
    assert moved_after(steps - 1 if method == "hift" else steps - chosen.interval, {}) < len(trained)
    short = steps - 1
    needed, setting = tuning.sweep(model, trained, chosen, steps=short, **asked)
    key, value = setting.removeprefix("tuning.").split(": ")
    assert needed == steps
    if method != "lisa":
        assert moved_after(short, {key: int(value)}) == len(trained)
