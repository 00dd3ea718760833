"""LoRA's relatives through `ftune train` against PEFT called by hand in a plain loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from training_runs import losses, no_rows, recipe, rows_file

import ftune
from ftune import plugin
from ftune.adapters.lora import add_lora
from ftune.adapters.options import LoRAOptions
from ftune.models.quiet import quiet
from ftune.plugin import Gradients, Setting
from ftune.training import loading

RATE, STEPS, SEED = 1e-2, 5, 42
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **settings})


def vera(**settings: Any) -> Any:
    from peft import VeraConfig

    return VeraConfig(**{"r": 16, "target_modules": ALL, "task_type": "CAUSAL_LM", **settings})


def eva() -> Any:
    from peft import EvaConfig

    return lora(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.99))


SHAPE = {"method": "lora", "r": 4, "lora_alpha": 8}
CASES: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "lora": (SHAPE, lora),
    "rslora": ({**SHAPE, "use_rslora": True}, lambda: lora(use_rslora=True)),
    "dora": ({**SHAPE, "use_dora": True}, lambda: lora(use_dora=True)),
    "loraplus": ({**SHAPE, "loraplus_lr_ratio": 8}, lora),
    "loraplus-dora": ({**SHAPE, "loraplus_lr_ratio": 8, "use_dora": True}, lambda: lora(use_dora=True)),
    "gaussian": ({**SHAPE, "init_lora_weights": "gaussian"}, lambda: lora(init_lora_weights="gaussian")),
    "orthogonal": ({**SHAPE, "init_lora_weights": "orthogonal"}, lambda: lora(init_lora_weights="orthogonal")),
    "pissa": ({**SHAPE, "init_lora_weights": "pissa"}, lambda: lora(init_lora_weights="pissa")),
    "quick-pissa": (
        {**SHAPE, "init_lora_weights": "pissa_niter_4"},
        lambda: lora(init_lora_weights="pissa_niter_4"),
    ),
    "olora": ({**SHAPE, "init_lora_weights": "olora"}, lambda: lora(init_lora_weights="olora")),
    "eva": ({**SHAPE, "init_lora_weights": "eva", "eva_batches": 1}, eva),
    "tokens": ({**SHAPE, "trainable_token_indices": [80, 90]}, lambda: lora(trainable_token_indices=[80, 90])),
    "one-layer": ({**SHAPE, "layers_to_transform": [1]}, lambda: lora(layers_to_transform=[1])),
    "patterns": (
        {**SHAPE, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3}),
    ),
    "excluded": ({**SHAPE, "exclude_modules": ["up_proj"]}, lambda: lora(exclude_modules=["up_proj"])),
    "regex": (
        {**SHAPE, "target_modules": r".*layers\.1\..*(q|v)_proj"},
        lambda: lora(target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    ),
    "vera": ({"method": "vera", "r": 16}, vera),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 4)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the batches that a run calibrates on, as it draws them."""
    seen: list[dict[str, Any]] = []
    draw = loading.batches_to_look_at

    def noting(*arguments: Any) -> Any:
        batches = draw(*arguments)

        def look(count: int, *, rows: int | None = None) -> Any:
            for batch in batches(count, rows=rows):
                seen.append(batch)
                yield batch

        return look

    monkeypatch.setattr(loading, "batches_to_look_at", noting)
    return seen


def one_batch(model: Path, rows: Path) -> dict[str, torch.Tensor]:
    """Return all rows padded, masked by looking for the answer's text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = []
    for line in rows.read_text().splitlines():
        turns = json.loads(line)["messages"]
        question = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        parts = (question, turns[1]["content"] + "<|im_end|>", "\n")
        prompt, reply, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in parts)
        encoded.append((prompt + reply + end, [-100] * len(prompt) + reply + [-100] * len(end)))
    longest = max(len(ids) for ids, _ in encoded)
    return {
        "input_ids": torch.tensor([ids + [2] * (longest - len(ids)) for ids, _ in encoded]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in encoded]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in encoded]),
    }


def by_hand(name: str, model: Path, batch: dict[str, Any], looked_at: list[dict[str, Any]]) -> list[float]:
    """Train as PEFT's documentation does."""
    from peft import get_peft_model, initialize_lora_eva_weights
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM, set_seed

    base = AutoModelForCausalLM.from_pretrained(model)
    set_seed(SEED)
    with quiet():
        adapted = get_peft_model(base, CASES[name][1]())
        if name == "eva":
            seen = [{key: batch[key] for key in ("input_ids", "attention_mask", "labels")} for batch in looked_at]
            initialize_lora_eva_weights(adapted, seen, show_progress_bar=False)
    if ratio := CASES[name][0].get("loraplus_lr_ratio"):
        optimizer = create_loraplus_optimizer(adapted, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=ratio)
    else:
        trained = [weight for weight in adapted.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        logits = adapted.train()(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


LONG = ("rslora", "gaussian", "orthogonal", "quick-pissa", "excluded", "loraplus", "tokens")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in CASES])
def test_losses_are_those_of_peft_in_a_plain_loop(
    name: str, tiny_model: Path, rows: Path, tmp_path: Path, looked_at: list[dict[str, Any]]
) -> None:
    settings = {"max_steps": STEPS, "lr_scheduler_type": "constant", "max_grad_norm": 0, "learning_rate": RATE}
    values = recipe(tiny_model, rows, tmp_path / "run", tuning=CASES[name][0], training={**settings, "seed": SEED})
    ours = losses(ftune.train(values).directory)
    theirs = by_hand(name, tiny_model, one_batch(tiny_model, rows), looked_at)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert ours[-1] < ours[0] - 0.01


RATED = [name for name in plugin.names(plugin.OPTIMIZERS) if plugin.optimizer(name).gradients is not Gradients.NONE]


@pytest.mark.parametrize("optim", RATED)
def test_b_moves_as_many_times_further_as_its_rate_is_higher(optim: str) -> None:
    """At the first step, from zero, for every optimizer: whatever it makes of the gradient, it multiplies by a rate."""
    method, ratio = plugin.optimizer(optim), 8
    moved = []
    for chosen in (None, ratio):
        options = LoRAOptions(r=4, loraplus_lr_ratio=chosen)
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(3)
            model = add_lora(make_model(), options, batches=no_rows)
        named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        rate_of = plugin.tuning("lora").learning_rate_of
        rates = {name: rate_of(name, weight, 1e-4, options) for name, weight in named.items()}
        groups: list[dict[str, Any]] = [
            {"params": [weight for name, weight in named.items() if rates[name] == rate], "weight_decay": 0.0}
            | ({} if rate == 1e-4 else {"lr": rate})
            for rate in sorted(set(rates.values()))
        ]
        before = {name: weight.detach().clone() for name, weight in named.items()}
        with quiet():
            optimizer: Any = method.build(
                groups, learning_rate=1e-4, options=method.Options(), setting=Setting(model=model)
            )
            loss = model.train()(input_ids=torch.arange(3, 35)[None], labels=torch.arange(3, 35)[None]).loss
            if method.gradients is Gradients.FUSED:
                optimizer.backward(loss, last=True)
            else:
                loss.backward()
            if hasattr(optimizer, "train"):
                optimizer.train()
            optimizer.step()
        moved.append({name: weight.detach() - before[name] for name, weight in named.items()})
    for name in moved[0]:
        if "lora_B" in name:
            torch.testing.assert_close(moved[1][name], ratio * moved[0][name], rtol=1e-3, atol=1e-9)
            assert moved[0][name].any()
