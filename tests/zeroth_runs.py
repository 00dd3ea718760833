"""A small model trained with forward passes, and how its bits are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from ftune import plugin

DECAY = 0.1


class Small(torch.nn.Module):
    """Two linear layers, the second one's matrix shared with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.inner = torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        return self.head(hidden + self.inner(self.norm(hidden)).tanh())


def small(dtype: torch.dtype = torch.float32) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Small().to(dtype).eval()


def batches(count: int, rows: int = 4) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(5)
    return [torch.randint(0, 11, (rows, 7), generator=noise) for _ in range(count)]


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function of the loss: the next token is guessed from this one."""

    def loss() -> torch.Tensor:
        logits = model(tokens)[:, :-1].double()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def grouped(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return groups as the trainer makes them: matrices decayed, vectors not."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": DECAY},
        {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
    ]


def made(model: torch.nn.Module, name: str = "mezo", *, rate: float = 1e-2, **more: Any) -> Any:
    found = plugin.optimizer(name)
    setting = plugin.Setting(
        model=model, seed=7, max_grad_norm=more.pop("max_grad_norm", 0.0), directory=more.pop("directory", None)
    )
    groups = [group for group in grouped(model) if group["params"]]
    return found.build(groups, learning_rate=rate, options=found.Options(**more), setting=setting)


def take(optimizer: Any, model: torch.nn.Module, rows: list[torch.Tensor]) -> list[float]:
    losses = []
    for tokens in rows:
        losses.append(float(optimizer.learn(loss_of(model, tokens))))
        optimizer.step()
    return losses


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the weights as integers, so that 0 and -0 differ and NaN equals itself."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {name: value.detach().clone().view(kinds[value.element_size()]) for name, value in model.named_parameters()}


def same(first: torch.nn.Module | dict[str, Any], second: torch.nn.Module | dict[str, Any]) -> bool:
    one, other = (each if isinstance(each, dict) else bits(each) for each in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
