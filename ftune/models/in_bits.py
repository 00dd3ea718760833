"""A merged model written in 4 or 8 bits, and what the rounding costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ftune.models.finished import Finished, load_finished
from ftune.models.load import load_model
from ftune.models.quiet import quiet
from ftune.recipe.schema import Model


@dataclass(frozen=True)
class Rounded:
    """The mean loss of a token, in nats, on the same texts."""

    before: float
    """Of the adapter beside the base it was trained on."""
    after: float
    """Of the merged model in few bits: an adapter smaller than their steps is rounded away."""


def write_in_bits(
    found: Finished, whole: Path, output: Path, quantization: Mapping[str, Any], inputs: Sequence[torch.Tensor]
) -> Rounded:
    """Write the merged model of a folder to another one in fewer bits, and compare it with the run's adapter.

    The sum is quantised once, from the plain weights: adding the adapter to codes and quantising that rounds twice.
    `quantization` are arguments of transformers' BitsAndBytesConfig, `inputs` token ids (1, n) of the texts.
    """
    before = mean_loss(load_finished(found, as_trained=True), inputs)
    merged = Model(model_name_or_path=str(whole), trust_remote_code=found.model.trust_remote_code)
    model = load_model(merged, quantization=quantization)
    with quiet():
        model.save_pretrained(output)
    return Rounded(before, mean_loss(load_model(merged.model_copy(update={"model_name_or_path": str(output)})), inputs))


def mean_loss(model: Any, inputs: Sequence[torch.Tensor]) -> float:
    """Return the mean loss of the second and later tokens of texts (1, n)."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad(), quiet():
        for ids in inputs:
            ids = ids.to(model.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            total += float(functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return total / count
