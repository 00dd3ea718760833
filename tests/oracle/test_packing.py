"""Packing changes no loss: a model sees each packed row as if it were alone."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftune.data.collate import Collator
from ftune.data.pack import packed

CAPACITY = 40


def make_rows() -> list[dict[str, list[int]]]:
    drawn = random.Random(0)
    rows = []
    for _ in range(9):
        ids = [drawn.randrange(3, 64) for _ in range(drawn.randint(1, 22))]
        labels = [-100] + [token if drawn.random() < 0.6 else -100 for token in ids[1:]]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def pack(rows: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    found = []
    for group in packed(numpy.array([len(row["input_ids"]) for row in rows]), CAPACITY):
        joined: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for at in group:
            joined["input_ids"] += rows[at]["input_ids"]
            joined["labels"] += rows[at]["labels"]
            joined["position_ids"] += range(len(rows[at]["input_ids"]))
        found.append(joined)
    return found


def make_model(attention: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.5,
    )  # fmt: skip
    config._attn_implementation = attention
    return LlamaForCausalLM(config).to(dtype).train()


def summed_loss(model: Any, batch: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    """Return the loss summed over learned tokens, worked out from the logits."""
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False, **more).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_is_the_loss_of_the_rows(
    attention: str, dtype: torch.dtype, tolerance: float, flatten: bool
) -> None:
    model, rows = make_model(attention, dtype), make_rows()
    alone = sum(summed_loss(model, Collator(0)([row])).item() for row in rows)
    padded = summed_loss(model, Collator(0)(rows)).item()
    packed = summed_loss(model, Collator(0, flatten=flatten)(pack(rows))).item()
    assert padded == pytest.approx(alone, rel=tolerance)
    assert packed == pytest.approx(alone, rel=tolerance)


def test_packed_gradients_are_those_of_the_rows() -> None:
    model, rows = make_model("sdpa", torch.float64), make_rows()
    gradients = []
    for batch in (Collator(0)(rows), Collator(0)(pack(rows))):
        model.zero_grad()
        summed_loss(model, batch).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_mask_of_ones_would_mix_the_rows(attention: str) -> None:
    """Why the collator gives none: if this begins to fail, transformers has mended it."""
    model, rows = make_model(attention, torch.float64), make_rows()
    batch = Collator(0)(pack(rows))
    right = summed_loss(model, batch).item()
    mixed = summed_loss(model, batch, attention_mask=torch.ones_like(batch["input_ids"])).item()
    assert abs(mixed - right) / right > 1e-3
