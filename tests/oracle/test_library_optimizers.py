"""Optimizers of other libraries, as ftune builds them, against their papers' formulas in float64."""

from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
import torch

from ftune import plugin
from ftune.rotation.masters import Masters

_RATE, _DECAY, _STEPS = 1e-2, 0.1, 20
Array = numpy.ndarray[Any, Any]
BITSANDBYTES = ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "paged_lion_8bit", "lion_32bit"]


def start_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 10


def slopes(shape: tuple[int, ...], steps: int = _STEPS) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=noise) for _ in range(steps)]


def made(name: str, weights: list[Any], model: Any = None, decay: float = _DECAY, **options: Any) -> Any:
    found = plugin.optimizer(name)
    for package in found.needs:
        pytest.importorskip(package)
    groups = [{"params": weights, "weight_decay": decay}]
    setting = plugin.Setting(model=model)
    return found.build(groups, learning_rate=_RATE, options=found.Options(**options), setting=setting)


def run(name: str, shape: tuple[int, ...], **options: Any) -> tuple[torch.nn.Parameter, Any]:
    weight = torch.nn.Parameter(start_of(shape))
    optimizer = made(name, [weight], **options)
    for gradient in slopes(shape):
        weight.grad = gradient.clone()
        optimizer.step()
    return weight, optimizer


def adamw(shape: tuple[int, ...]) -> Array:
    """Loshchilov and Hutter (2019), algorithm 2, the decay scaled by the rate."""
    weight, first, second = start_of(shape).double().numpy(), 0.0, 0.0
    for step, slope in enumerate(slopes(shape), start=1):
        gradient = slope.double().numpy()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**step) / (numpy.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weight = weight * (1 - _RATE * _DECAY) - _RATE * update
    return weight  # type: ignore[no-any-return]


def lion(shape: tuple[int, ...]) -> Array:
    """Chen et al. (2023), algorithm 2."""
    weight, momentum = start_of(shape).double().numpy(), 0.0
    for slope in slopes(shape):
        gradient = slope.double().numpy()
        weight = weight * (1 - _RATE * _DECAY) - _RATE * numpy.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.99 * momentum + 0.01 * gradient
    return weight  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", BITSANDBYTES)
@pytest.mark.parametrize("shape", [(6, 5), (7,), (63, 65)], ids=str)
def test_bitsandbytes_follows_the_papers(name: str, shape: tuple[int, ...]) -> None:
    """Below 4096 elements states of 8 bits are 32: the formula exactly."""
    formula = lion if "lion" in name else adamw
    weight, _ = run(name, shape)
    assert numpy.abs(weight.detach().double().numpy() - formula(shape)).max() <= 1e-6


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_state_types_of_a_large_matrix(name: str) -> None:
    weight, optimizer = run(name, (64, 128))
    state = optimizer.state[weight]
    kinds = {state[key].dtype for key in ("state1", "state2") if key in state}
    assert kinds == {torch.float32 if "32" in name else torch.uint8}
    if "32" in name:
        formula = lion if "lion" in name else adamw
        assert numpy.abs(weight.detach().double().numpy() - formula((64, 128))).max() <= 1e-6


def test_few_signs_differ_in_eight_bits() -> None:
    """Lion moves every element by the whole rate, so 8-bit momentum shows only where a sign is in doubt."""
    weight, _ = run("lion_8bit", (64, 128), min_8bit_size=1)
    apart = numpy.abs(weight.detach().double().numpy() - lion((64, 128))) > _RATE
    assert 0 < apart.mean() < 0.05
    near, _ = run("lion_8bit", (64, 128), min_8bit_size=100_000)
    assert numpy.abs(near.detach().double().numpy() - lion((64, 128))).max() <= 1e-6


class Language(torch.nn.Module):
    """A model of the shape that counts here: embedding, hidden matrix, output layer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(128, 64)
        self.hidden = torch.nn.Linear(64, 80)
        self.norm = torch.nn.LayerNorm(80)
        self.back = torch.nn.Linear(80, 64, bias=False)
        self.head = torch.nn.Linear(64, 128, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> Any:
        return self.head


def teach(optimizer: Any, model: Any, steps: int, seed: int = 0) -> None:
    noise = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=noise).to(weight.dtype)
        optimizer.step()


EIGHT_BITS = ["adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_embeddings_keep_32_bits_and_nothing_else_does(name: str, tied: bool) -> None:
    torch.manual_seed(0)
    # Two models, one after the other, and the second one's groups in another order: nothing is left of the first.
    for turn in (False, True):
        model = Language(tied)
        weights = list(model.parameters())
        optimizer = made(name, weights[::-1] if turn else weights, model, min_8bit_size=1000)
        teach(optimizer, model, 2)
        for called, weight in model.named_parameters():
            eight = weight.numel() >= 1000 and "embed" not in called
            assert optimizer.state[weight]["state1"].dtype == (torch.uint8 if eight else torch.float32), called


@pytest.mark.parametrize("smallest", [1, 4096, 5120, 5121])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_declared_state_is_counted_tensor_by_tensor(name: str, tied: bool, smallest: int) -> None:
    """Of embeddings in 32 bits, of an output layer of its own in 8, and of tensors at and below the limit."""
    model = Language(tied)
    optimizer = made(name, list(model.parameters()), model, min_8bit_size=smallest)
    teach(optimizer, model, 1)
    found = plugin.optimizer(name)
    for called, weight in model.named_parameters():
        # The tables by which 8 bits are read are the same for all tensors.
        held = {key: value for key, value in optimizer.state[weight].items() if not key.startswith("qmap")}
        tensor = plugin.TrainedTensor(tuple(weight.shape), embedding="embed" in called)
        declared = found.state_bytes(tensor, found.Options(min_8bit_size=smallest))
        assert sum(value.nbytes for value in held.values() if torch.is_tensor(value)) == declared, called


def test_float32_copies_of_embeddings_are_embeddings_too() -> None:
    """Where copies of 16-bit weights are moved in their stead, 8-bit states and projections must know them."""
    for name, options in (("adamw_8bit", {"min_8bit_size": 1}), ("galore_adamw", {"rank": 4})):
        model = Language().bfloat16()
        masters = Masters(model.parameters())
        groups = masters.in_place_of_weights([{"params": list(model.parameters()), "weight_decay": 0.0}])
        found = plugin.optimizer(name)
        built: Any = found.build(
            groups, learning_rate=_RATE, options=found.Options(**options), setting=plugin.Setting(model=model)
        )
        teach(built, torch.nn.ParameterList([copy for _, copy in masters.pairs]), 1)
        of = {id(weight): copy for weight, copy in masters.pairs}
        for weight, whole in ((model.embed.weight, True), (model.hidden.weight, False)):
            copy = of[id(weight)]
            state = [value for value in built.state[copy].values() if torch.is_tensor(value)]
            same = [value for value in state if value.shape == weight.shape and value.dtype == torch.float32]
            assert (len(same) == 2) is whole, name


def test_the_library_of_its_own_remembers_across_runs() -> None:
    """Why each optimizer gets a manager of its own: the shared one takes over exceptions by their place."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shared = bitsandbytes.optim.GlobalOptimManager.get_instance()
    before = dict(shared.pid2config), dict(shared.index2config), list(shared.module_weight_config_triple)
    model = Language()
    teach(made("adamw_8bit", list(model.parameters()), model), model, 1)
    assert (shared.pid2config, shared.index2config, shared.module_weight_config_triple) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*BITSANDBYTES, "muon", "schedule_free_adamw"])
def test_a_resumed_run_has_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """10 steps, a checkpoint as a file, 10 more: as 20; the state's types are the same too."""
    torch.manual_seed(0)
    start = {called: value.to(dtype) for called, value in Language().state_dict().items()}

    def fresh() -> tuple[Any, Any]:
        model = Language().to(dtype)
        model.load_state_dict(start)
        more = {"min_8bit_size": 1000} if "8bit" in name else {}
        return model, made(name, list(model.parameters()), model, **more)

    whole, optimizer = fresh()
    teach(optimizer, whole, 10, 1)
    teach(optimizer, whole, 10, 2)
    types = [[getattr(value, "dtype", None) for value in state.values()] for state in optimizer.state.values()]
    first, optimizer = fresh()
    teach(optimizer, first, 10, 1)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = fresh()
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    teach(optimizer, second, 10, 2)
    for called, weight in whole.state_dict().items():
        assert torch.equal(weight, second.state_dict()[called]), called
    found = [[getattr(value, "dtype", None) for value in state.values()] for state in optimizer.state.values()]
    assert sorted(map(str, found)) == sorted(map(str, types))


def newton_schulz(matrix: Array, steps: int, exact: bool) -> Array:
    """Jordan (2024): five odd polynomials of the singular values, with the published coefficients.

    `exact` computes in float64; otherwise products are rounded to bfloat16 as the library's are.
    """
    kept = torch.float64 if exact else torch.bfloat16
    turned = matrix.shape[0] > matrix.shape[1]
    found = torch.from_numpy(matrix.T if turned else matrix).to(kept)
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = found @ found.T
        found = 3.4445 * found + (-4.7750 * square + 2.0315 * square @ square) @ found
    return (found.T if turned else found).double().numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)], ids=str)
@pytest.mark.parametrize(("kind", "nesterov"), [("match_rms_adamw", True), ("original", True), ("original", False)])
def test_muon_follows_its_formula(shape: tuple[int, int], kind: str, nesterov: bool) -> None:
    """The library computes the iteration in bfloat16, 8 bits: its steps agree with float64's to that."""
    weight, optimizer = run("muon", shape, adjust_lr_fn=kind, nesterov=nesterov)
    exact, momentum = start_of(shape).double().numpy(), 0.0
    size = 0.2 * max(shape) ** 0.5 if kind == "match_rms_adamw" else max(1, shape[0] / shape[1]) ** 0.5
    for slope in slopes(shape):
        gradient = slope.double().numpy()
        momentum = 0.95 * momentum + 0.05 * gradient
        ahead = 0.05 * gradient + 0.95 * momentum if nesterov else momentum
        exact = exact * (1 - _RATE * _DECAY) - _RATE * size * newton_schulz(ahead, 5, exact=True)
    travelled = numpy.abs(exact - start_of(shape).double().numpy()).max()
    assert numpy.abs(weight.detach().double().numpy() - exact).max() <= 0.02 * travelled
    (state,) = optimizer.state.values()
    assert numpy.abs(state["momentum_buffer"].double().numpy() - momentum).max() <= 1e-6


def test_newton_schulz_brings_singular_values_near_one() -> None:
    matrix = slopes((24, 40), 1)[0].double().numpy()
    values = numpy.linalg.svd(newton_schulz(matrix, 5, exact=True), compute_uv=False)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    """Embedding, output layer and vectors move exactly as by PyTorch's AdamW, and follow the same schedule."""
    torch.manual_seed(0)
    model, other = Language(), Language()
    other.load_state_dict(model.state_dict())
    optimizer = made("muon", list(model.parameters()), model)
    adamw = torch.optim.AdamW(other.parameters(), lr=_RATE, weight_decay=_DECAY)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for one in (optimizer, adamw):
        schedule = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step))
        for seed in range(3):
            teach(one, model if one is optimizer else other, 1, seed)
            schedule.step()
    hidden = {"hidden.weight", "back.weight"}
    for (called, weight), reference in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, reference) is (called not in hidden), called
        assert ("momentum_buffer" in optimizer.state[weight]) is (called in hidden)


@pytest.mark.parametrize(("name", "hidden"), [("muon", 4), ("galore_adamw", None)])
def test_state_of_ends_is_that_of_adamw(name: str, hidden: int | None) -> None:
    model = Language()
    optimizer = made(name, list(model.parameters()), model)
    teach(optimizer, model, 1)
    found: Any = plugin.optimizer(name)
    for called, weight in model.named_parameters():
        state = [value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.ndim]
        is_hidden = weight.ndim == 2 and called in ("hidden.weight", "back.weight")
        declared = found.state_bytes(plugin.TrainedTensor(tuple(weight.shape), hidden=is_hidden), found.Options())
        assert sum(value.numel() * value.element_size() for value in state) == declared, called
        if hidden and is_hidden:
            assert declared == hidden * weight.numel()


def test_schedule_free_follows_the_paper() -> None:
    """Defazio et al. (2024), algorithm 1: y = (1 - beta1) z + beta1 x, with the decay taken at y; warmup by weights."""
    shape = (6, 10)
    weight = torch.nn.Parameter(start_of(shape))
    optimizer = made("schedule_free_adamw", [weight])
    rates = [_RATE * min(1, step / 5) for step in range(_STEPS)]  # warmup from zero, then constant
    z = x = start_of(shape).double().numpy()
    second, total = 0.0, 0.0
    for step, (slope, rate) in enumerate(zip(slopes(shape), rates, strict=True), start=1):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = slope.clone()
        optimizer.step()
        gradient, y = slope.double().numpy(), 0.1 * z + 0.9 * x
        second = 0.999 * second + 0.001 * gradient**2
        update = gradient / (numpy.sqrt(second / (1 - 0.999**step)) + 1e-8) + _DECAY * y
        z = z - rate * update
        largest = max(rates[:step])
        total += largest**2
        share = largest**2 / total if total else 0
        x = (1 - share) * x + share * z
        if step in (7, _STEPS):
            assert numpy.abs(weight.detach().double().numpy() - (0.1 * z + 0.9 * x)).max() <= 1e-6
            optimizer.eval()
            assert numpy.abs(weight.detach().double().numpy() - x).max() <= 1e-6
            optimizer.train()


def test_looking_at_the_average_leaves_training_as_it_was() -> None:
    """Any number of evaluations and checkpoints in between, and not one bit differs."""
    found = []
    for looks in (False, True):
        weight = torch.nn.Parameter(start_of((6, 10)))
        optimizer = made("schedule_free_adamw", [weight])
        for gradient in slopes((6, 10)):
            optimizer.train()
            weight.grad = gradient.clone()
            optimizer.step()
            if looks:
                optimizer.eval()
                optimizer.eval()
                state = optimizer.state_dict()
                again = torch.nn.Parameter(weight.detach().clone())
                optimizer = made("schedule_free_adamw", [again])
                optimizer.load_state_dict(state)
                weight = again
        optimizer.train()
        found.append(weight.detach())
    assert torch.equal(*found)
