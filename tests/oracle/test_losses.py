"""The loss against all logits and PyTorch's cross-entropy, and how few logits it asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_model
from torch import nn

from ftune.losses import accepts_logits_to_keep, causal_cross_entropy

PROMPT, LENGTH = 20, 32


def batch() -> dict[str, torch.Tensor]:
    """Return two rows with a long prompt, a gap in the first row's answer and padding after the second's."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 260, (2, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    labels[:, 24:26] = -100
    labels[1, 29:] = -100
    mask = torch.ones_like(ids)
    mask[1, 29:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class Plain(nn.Module):
    """A model that gives all its logits or none."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.network = inner

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        return self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft calls it by its old name
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("wrap", "chosen"), [(lambda model: model, True), (adapted, True), (Plain, False)])
def test_a_masked_prompt_costs_no_logits_and_changes_no_loss(wrap: Any, chosen: bool, smoothing: float) -> None:
    network = make_model().double()
    model, rows = wrap(network), batch()
    inputs = {name: value for name, value in rows.items() if name != "labels"}
    logits = network(**inputs, use_cache=False).logits
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        rows["labels"][:, 1:].flatten(),
        reduction="sum",
        label_smoothing=smoothing,
    )
    expected.backward()
    gradient = network.model.embed_tokens.weight.grad
    if gradient is None:  # frozen below an adapter
        gradient = torch.zeros(())
    network.zero_grad()
    widths: list[int] = []
    network.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    loss = causal_cross_entropy(model, rows, num_items=7, label_smoothing=smoothing)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item() / 7, rel=1e-6)
    # Each learned token is predicted one position before it: 12 places of the answer without a gap of 2.
    assert widths == [LENGTH - PROMPT - 2 if chosen else LENGTH]
    assert accepts_logits_to_keep(model) == chosen
    loss.backward()
    if network.model.embed_tokens.weight.grad is not None:
        torch.testing.assert_close(network.model.embed_tokens.weight.grad * 7, gradient, rtol=1e-5, atol=1e-6)
