"""Each optimizer against its paper: formulas written out here in float64, and bytes counted, not declared."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from ftune import plugin

_STEPS = 20
_RATE = 1e-2
_DECAY = 0.1


def made(name: str, decayed: list[torch.Tensor], other: list[torch.Tensor], rate: float = _RATE, **options: Any) -> Any:
    """Build an optimizer as the trainer does: decay in the first group only."""
    found = plugin.optimizer(name)
    groups = [{"params": decayed, "weight_decay": _DECAY}, {"params": other, "weight_decay": 0.0}]
    return found.build(groups, learning_rate=rate, options=found.Options(**options), setting=plugin.Setting())


KEPT = [name for name in plugin.names(plugin.OPTIMIZERS) if plugin.optimizer(name).gradients is plugin.Gradients.KEPT]


def tensors() -> tuple[torch.nn.Parameter, torch.nn.Parameter, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return a matrix, a vector, and gradients for some steps."""
    noise = torch.Generator().manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(6, 5, generator=noise))
    vector = torch.nn.Parameter(torch.randn(7, generator=noise))
    gradients = [(torch.randn(6, 5, generator=noise), torch.randn(7, generator=noise)) for _ in range(_STEPS)]
    return matrix, vector, gradients


def run(name: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    matrix, vector, gradients = tensors()
    optimizer = made(name, [matrix], [vector], **options)
    for matrix.grad, vector.grad in gradients:
        optimizer.step()
    return matrix.detach(), vector.detach()


def adamw(weight: Any, gradients: list[Any], decay: float, betas: tuple[float, float] = (0.9, 0.999)) -> Any:
    """Loshchilov and Hutter (2019), algorithm 2, with the schedule multiplier 1 and the decay scaled by the rate."""
    first, second = numpy.zeros_like(weight), numpy.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        first_hat, second_hat = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
        weight = weight - _RATE * (first_hat / (numpy.sqrt(second_hat) + 1e-8) + decay * weight)
    return weight


def sgd(weight: Any, gradients: list[Any], decay: float, momentum: float = 0.0) -> Any:
    """Heavy ball; the decay is decoupled: it does not enter the direction."""
    direction = numpy.zeros_like(weight)
    for gradient in gradients:
        weight = weight * (1 - _RATE * decay)
        direction = momentum * direction + gradient
        weight = weight - _RATE * direction
    return weight


def adafactor(weight: Any, gradients: list[Any], decay: float) -> Any:
    """Shazeer and Stern (2018), algorithm 4 (matrices) and 5 (vectors), at a fixed rate; decay before the step."""
    row, column, whole = 0.0, 0.0, 0.0
    for step, gradient in enumerate(gradients, start=1):
        beta = 1 - step**-0.8
        squared = gradient**2 + 1e-30
        if gradient.ndim == 2:
            row = beta * row + (1 - beta) * squared.sum(axis=1)
            column = beta * column + (1 - beta) * squared.sum(axis=0)
            second = numpy.outer(row, column) / numpy.sum(row)
        else:
            whole = beta * whole + (1 - beta) * squared
            second = whole
        update = gradient / numpy.sqrt(second)
        update = update / max(1.0, numpy.sqrt(numpy.mean(update**2)))
        weight = weight * (1 - _RATE * decay) - _RATE * update
    return weight


@pytest.mark.parametrize(
    ("name", "formula", "options"),
    [
        ("adamw_torch", adamw, {}),
        ("adamw_torch", adamw, {"betas": (0.8, 0.95)}),
        ("adamw_torch_fused", adamw, {}),
        ("sgd", sgd, {}),
        ("sgd", sgd, {"momentum": 0.9}),
        ("adafactor", adafactor, {}),
    ],
)
def test_steps_follow_the_paper(name: str, formula: Any, options: dict[str, Any]) -> None:
    """Decay is decoupled from the gradient, and touches only the group that has it."""
    matrix, vector, gradients = tensors()
    after = run(name, **options)
    first = [pair[0].double().numpy() for pair in gradients]
    second = [pair[1].double().numpy() for pair in gradients]
    expected = (
        formula(matrix.detach().double().numpy(), first, _DECAY, **options),
        formula(vector.detach().double().numpy(), second, 0.0, **options),
    )
    for got, wanted in zip(after, expected, strict=True):
        assert numpy.abs(got.double().numpy() - wanted).max() <= 2e-6


def test_fused_steps_like_unfused() -> None:
    for fused, plain in zip(run("adamw_torch_fused"), run("adamw_torch"), strict=True):
        assert (fused - plain).abs().max() <= 1e-6


def test_adafactor_factors_a_rank_one_gradient_exactly() -> None:
    """Where g squared is an outer product the factored moment is g squared itself: every entry moves by the rate."""
    gradient = torch.outer(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 4.0]))
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = made("adafactor", [weight], [])
    weight.grad = gradient
    optimizer.step()
    assert torch.allclose(weight.detach(), -_RATE * gradient.sign(), atol=1e-8)


def regression(name: str) -> tuple[float, Any]:
    """Return the loss after some steps on a small regression, and the optimizer."""
    noise = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 64, generator=noise)
    targets = inputs @ torch.randn(64, 128, generator=noise)
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = made(name, [weight], [], 0.05)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        (inputs @ weight - targets).square().mean().backward()
        optimizer.step()
    return float((inputs @ weight.detach() - targets).square().mean()), optimizer


def test_eight_bits_learn_like_thirty_two() -> None:
    pytest.importorskip("bitsandbytes")
    reference, _ = regression("adamw_torch")
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        loss, optimizer = regression(name)
        assert loss == pytest.approx(reference, rel=0.02)
        (state,) = optimizer.state.values()
        assert (state["state1"].dtype, state["state2"].dtype) == (torch.uint8, torch.uint8)


def test_paged_on_a_cpu_is_unpaged() -> None:
    pytest.importorskip("bitsandbytes")
    assert regression("paged_adamw_8bit")[0] == regression("adamw_8bit")[0]


def state_bytes(name: str, **options: Any) -> int:
    weight = torch.nn.Parameter(torch.zeros(64, 4096))
    optimizer = made(name, [weight], [], **options)
    weight.grad = torch.randn(64, 4096, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    # The quantisation tables of 8-bit states are shared by all weights; a step count is one number.
    values = [value for key, value in optimizer.state[weight].items() if not key.startswith("qmap")]
    found = [value for value in values if isinstance(value, torch.Tensor) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in found)


@pytest.mark.parametrize("name", KEPT)
def test_declared_state_is_counted_state(name: str) -> None:
    found = plugin.optimizer(name)
    for package in found.needs:
        pytest.importorskip(package)
    declared = found.state_bytes(plugin.TrainedTensor((64, 4096)), found.Options())
    assert state_bytes(name) == declared
    if name == "adafactor":
        assert declared == 4 * (64 + 4096)


def test_notes_on_state() -> None:
    for name, options in (("sgd", {"momentum": 0.9}), ("adafactor", {"beta1": 0.9})):
        found = plugin.optimizer(name)
        assert state_bytes(name, **options) >= 4 * 64 * 4096
        assert found.state_bytes(plugin.TrainedTensor((64, 4096)), found.Options(**options)) == state_bytes(
            name, **options
        )


@pytest.mark.parametrize("name", KEPT)
def test_decay_is_decoupled_and_keeps_to_its_group(name: str) -> None:
    """Without a gradient's help only the decay moves a weight: by rate times decay, and only where it is set."""
    for package in plugin.optimizer(name).needs:
        pytest.importorskip(package)
    decayed, other = torch.nn.Parameter(torch.ones(64, 128)), torch.nn.Parameter(torch.ones(64, 128))
    optimizer = made(name, [decayed], [other])
    decayed.grad, other.grad = torch.zeros(64, 128), torch.zeros(64, 128)
    optimizer.step()
    assert torch.allclose(decayed.detach(), torch.full((64, 128), 1 - _RATE * _DECAY), atol=1e-7)
    assert torch.equal(other.detach(), torch.ones(64, 128))
    decayed.grad, other.grad = torch.ones(64, 128), torch.ones(64, 128)
    optimizer.step()
    moved = (other.detach() - decayed.detach() - _RATE * _DECAY).abs().max()
    assert moved <= _RATE * _DECAY * 1.1, "a decay inside the gradient would be scaled by it"
