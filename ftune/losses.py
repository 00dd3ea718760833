"""Next-token cross-entropy, the loss of every supervised objective."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional

IGNORED = -100
"""The label of a token that is not learned."""


def causal_cross_entropy(
    model: Any,
    batch: dict[str, torch.Tensor],
    *,
    num_items: torch.Tensor | int,
    label_smoothing: float = 0.0,
    by_source: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the summed cross-entropy of the trained tokens over `num_items`, in float32.

    `batch` holds input_ids and labels, both (rows, length); a label names its own position's token and is predicted
    from the position before. Hidden states that predict no trained token in any row never reach the output layer:
    the sum is the same and a masked prompt costs no logits. `by_source` (sources, 2) is added each source's summed
    loss and number of trained tokens, where the batch has a `source` (rows, length) for each token.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "source")}
    targets = batch["labels"][:, 1:]
    positions = (targets != IGNORED).any(dim=0).nonzero().squeeze(-1)
    if accepts_logits_to_keep(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, positions]
    # Summed in float32 whatever the compute dtype: thousands of bfloat16 terms would lose the small ones.
    wanted = targets[:, positions].flatten()
    settings: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": label_smoothing}
    if by_source is None or "source" not in batch:
        return functional.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="sum", **settings) / num_items
    each = functional.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none", **settings)
    sources = batch["source"][:, 1:][:, positions].flatten()
    with torch.no_grad():
        counted = torch.stack([each.detach(), (wanted != IGNORED).float()], dim=1).to(by_source.dtype)
        by_source.index_add_(0, sources, counted)
    return each.sum() / num_items


def accepts_logits_to_keep(model: Any) -> bool:
    """Return whether the innermost model can be asked for the logits of chosen positions only."""
    inner = model
    for _ in range(8):
        known = inspect.signature(inner.forward).parameters
        if "logits_to_keep" in known:
            return True
        wrapped = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        wrapped = wrapped or getattr(inner, "base_model", None)
        if wrapped is None or wrapped is inner:
            break
        inner = getattr(wrapped, "model", wrapped) if hasattr(wrapped, "peft_config") else wrapped
    return False
