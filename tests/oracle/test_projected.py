"""GaLore and APOLLO against their papers' formulas in float64, and against what they must equal at full rank."""

from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
import torch

from ftune import plugin
from ftune.fused.rounding import Rounding
from ftune.projected.apollo import Apollo, channel_squares, ratios
from ftune.projected.galore import GaLore, leading_directions
from ftune.projected.matrix import project
from ftune.projected.options import ApolloOptions, GaLoreOptions

_RATE, _DECAY, _RANK, _GAP, _STEPS = 1e-2, 0.1, 3, 8, 20
Array = numpy.ndarray[Any, Any]

SHAPES = pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=["wide", "tall"])
SIDES = pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])


def slopes(shape: tuple[int, ...], steps: int = _STEPS) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=noise) for _ in range(steps)]


def start_of(shape: tuple[int, ...]) -> torch.Tensor:
    """Return a weight of a usual size, of which float32 keeps 8 digits after the point."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 10


def run(rule: Any, weight: torch.Tensor, gradients: list[torch.Tensor], state: Any = None, **group: Any) -> Any:
    """Move a weight by a rule and return its state."""
    group = {"lr": _RATE, "weight_decay": _DECAY, **group}
    state = rule.fresh(weight) if state is None else state
    rounding = Rounding("nearest", 0)
    for number, gradient in enumerate(gradients):
        rounding.begin(number, 0)
        rule.update(weight, gradient.clone(), state, group, rounding, weight.shape)
    return state


class Adam:
    """Kingma and Ba (2015), algorithm 1, in float64."""

    def __init__(self) -> None:
        self.first: Any = 0.0
        self.second: Any = 0.0
        self.step = 0

    def __call__(self, gradient: Array) -> Array:
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first, second = self.first / (1 - 0.9**self.step), self.second / (1 - 0.999**self.step)
        return first / (numpy.sqrt(second) + 1e-8)  # type: ignore[no-any-return]


def is_left(shape: tuple[int, ...], side: str) -> bool:
    wide = shape[0] <= shape[1]
    return {"std": wide, "reverse_std": not wide, "left": True, "right": False}[side]


def singular(gradient: Array, left: bool) -> Array:
    """Return the leading singular vectors in columns, each with its largest entry positive."""
    vectors = numpy.linalg.svd(gradient if left else gradient.T, full_matrices=False)[0][:, :_RANK]
    largest = vectors[numpy.abs(vectors).argmax(axis=0), numpy.arange(_RANK)]
    return vectors * numpy.sign(largest)  # type: ignore[no-any-return]


def galore(weight: Array, gradients: list[Array], left: bool) -> Array:
    """Zhao et al. (2024), algorithm 2, in float64; the right side is the left of the transpose."""
    if not left:
        return galore(weight.T, [gradient.T for gradient in gradients], True).T
    adam = Adam()
    for number, gradient in enumerate(gradients):
        if number % _GAP == 0:
            basis = singular(gradient, True)
        step = basis @ adam(basis.T @ gradient)
        weight = weight * (1 - _RATE * _DECAY) - _RATE * 0.25 * step
    return weight


@SHAPES
@SIDES
def test_galore_follows_the_paper(shape: tuple[int, int], side: Any) -> None:
    """Over 20 steps with a new projection at the 9th and the 17th, the running means carried over as they are."""
    weight, gradients = start_of(shape), slopes(shape)
    expected = galore(weight.double().numpy(), [one.double().numpy() for one in gradients], is_left(shape, side))
    run(GaLore(GaLoreOptions(rank=_RANK, update_proj_gap=_GAP, proj_type=side)), weight, gradients)
    assert numpy.abs(weight.double().numpy() - expected).max() <= 1e-6


class Identity(GaLore):
    """GaLore without Adam, and at any rank."""

    def _projects(self, weight: torch.Tensor, group: dict[str, Any]) -> bool:
        return True

    def _direction(self, projected: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        return projected


@SHAPES
@pytest.mark.parametrize("rank", [6, 2])
def test_galore_without_adam_is_projected_descent(shape: tuple[int, int], rank: int) -> None:
    """W - lr P P^T G; at full rank P P^T is the identity, and it is gradient descent."""
    weight, gradients = start_of(shape), slopes(shape)
    expected = weight.double().numpy()
    for number, one in enumerate(gradients):
        gradient = one.double().numpy() if shape[0] <= shape[1] else one.double().numpy().T
        if number % _GAP == 0:
            basis = numpy.linalg.svd(gradient, full_matrices=False)[0][:, :rank]
        step = gradient if rank == 6 else basis @ basis.T @ gradient
        expected = expected - _RATE * (step if shape[0] <= shape[1] else step.T)
    options = GaLoreOptions(rank=rank, update_proj_gap=_GAP, scale=1)
    run(Identity(options), weight, gradients, weight_decay=0.0)
    assert numpy.abs(weight.double().numpy() - expected).max() <= 1e-5


def test_full_rank_galore_is_adam_in_a_turned_basis() -> None:
    """With the basis of the first gradient kept: W' = P^T W moves by AdamW on P^T G."""
    weight, gradients = start_of((6, 10)), slopes((6, 10))

    class Full(GaLore):
        def _projects(self, weight: torch.Tensor, group: dict[str, Any]) -> bool:
            return True

    basis = leading_directions(gradients[0], 6, left=True)
    turned = torch.nn.Parameter(basis.T @ weight)
    adamw = torch.optim.AdamW([turned], lr=_RATE, weight_decay=_DECAY)
    for gradient in gradients:
        turned.grad = basis.T @ gradient
        adamw.step()
    run(Full(GaLoreOptions(rank=6, scale=1)), weight, gradients)
    assert (weight - basis @ turned.detach()).abs().max() <= 1e-5


@SHAPES
def test_leading_directions_span_what_is_there(shape: tuple[int, int]) -> None:
    """A gradient of rank 2 is given back whole by a projection of rank 2, from either side."""
    noise = torch.Generator().manual_seed(3)
    gradient = torch.randn(shape[0], 2, generator=noise) @ torch.randn(2, shape[1], generator=noise)
    for left in (True, False):
        basis = leading_directions(gradient, 2, left=left)
        small = project(gradient, basis, left=left)
        back = basis @ small if left else small @ basis.T
        assert (back - gradient).abs().max() <= 1e-5
        assert (basis.T @ basis - torch.eye(2)).abs().max() <= 1e-6
        assert torch.equal(leading_directions(-gradient, 2, left=left), basis), "a sign is nobody's choice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projecting_by_stretches_is_one_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = slopes((37, 11), 1)[0].to(dtype)
    basis = {True: torch.randn(37, 4), False: torch.randn(11, 4)}
    monkeypatch.setattr("ftune.fused.rule.SLICE", 50)
    exact = gradient.double()
    for left, expected in ((True, basis[True].double().T @ exact), (False, exact @ basis[False].double())):
        assert (project(gradient, basis[left], left=left) - expected).abs().max() <= 1e-5
        squares = exact.square().sum(dim=0 if left else 1)
        assert (channel_squares(gradient, left=left) - squares).abs().max() <= 1e-5


def test_stretches_do_not_change_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in (
        GaLore(GaLoreOptions(rank=_RANK)),
        Apollo(ApolloOptions(rank=_RANK), 0),
        Apollo(ApolloOptions(rank=_RANK, proj_type="right"), 0),
    ):
        found = []
        for size in (1 << 20, 30):
            monkeypatch.setattr("ftune.fused.rule.SLICE", size)
            weight = torch.ones(6, 10)
            run(rule, weight, slopes((6, 10)))
            found.append(weight)
        assert (found[0] - found[1]).abs().max() <= 1e-6


def drawn(rule: Apollo, gradient: torch.Tensor, step: int, left: bool) -> Array:
    """Return the projection that a step takes: what the formulas leave to chance."""
    return rule._projection(gradient, {"step": step, "seed": rule.seed}, left=left).double().numpy()  # type: ignore[no-any-return]


def apollo(
    weight: Array, gradients: list[Array], bases: list[Array], scale: float, tensor: bool, limit: float | None
) -> tuple[Array, list[float]]:
    """Zhu et al. (2024), algorithm 1, in float64, projected from the left; and how much steps were shortened."""
    adam, before, shortened = Adam(), 0.0, []
    for gradient, basis in zip(gradients, bases, strict=True):
        small = basis.T @ gradient
        step = adam(small)
        axis = None if tensor else 0
        factor = numpy.sqrt((step**2).sum(axis=axis)) / numpy.sqrt((small**2).sum(axis=axis))
        update = numpy.sqrt(scale) * gradient * factor
        length = numpy.sqrt((update**2).sum())
        cut = 1.0
        if limit is not None and before and length / before > limit:
            cut = limit * before / length
        update, before = update * cut, length * cut
        shortened.append(cut)
        weight = weight * (1 - _RATE * _DECAY) - _RATE * update
    return weight, shortened


@SHAPES
@SIDES
@pytest.mark.parametrize("limit", [1.01, None])
@pytest.mark.parametrize(("rank", "scale", "kind"), [(3, 1.0, "channel"), (1, 128.0, "tensor")], ids=["apollo", "mini"])
def test_apollo_follows_the_paper(
    shape: tuple[int, int], side: Any, limit: float | None, rank: int, scale: float, kind: Any
) -> None:
    """Over 20 steps with a new projection at the 9th and the 17th, where gradients grow and shrink."""
    options = ApolloOptions(
        rank=rank, scale=scale, scale_type=kind, update_proj_gap=_GAP, proj_type=side, norm_growth_limit=limit
    )
    rule, left = Apollo(options, 7), is_left(shape, side)
    weight = start_of(shape)
    gradients = [gradient * (1 + number % 5) for number, gradient in enumerate(slopes(shape))]
    bases = [drawn(rule, gradient, step, left) for step, gradient in enumerate(gradients, start=1)]
    start, exact = weight.double().numpy(), [one.double().numpy() for one in gradients]
    if not left:
        start, exact = start.T, [one.T for one in exact]
    expected, shortened = apollo(start, exact, bases, scale, kind == "tensor", limit)
    run(rule, weight, gradients)
    assert bool(min(shortened) < 0.9) is (limit is not None), "the limit takes part in the comparison"
    found = weight.double().numpy()
    assert numpy.abs((found if left else found.T) - expected).max() <= 1e-6 * numpy.sqrt(scale)


def test_the_growth_of_a_step_is_limited() -> None:
    weight, gradient = torch.zeros(6, 10), slopes((6, 10), 1)[0]
    rule, state, lengths = Apollo(ApolloOptions(rank=_RANK), 0), None, []
    for sign in (1, -1, -1, -1):  # the running mean is turned round: nearly zero at the second step, then growing
        before = weight.clone()
        state = run(rule, weight, [gradient * sign], state, weight_decay=0.0)
        lengths.append(float((weight - before).norm()))
    assert lengths[1] < 0.1 * lengths[0], "a shorter step is left alone"
    assert lengths[2] == pytest.approx(1.01 * lengths[1], rel=1e-4)
    assert lengths[3] == pytest.approx(1.01 * lengths[2], rel=1e-4)


def test_a_step_of_zero_does_not_stop_the_next() -> None:
    weight = torch.zeros(6, 10)
    rule = Apollo(ApolloOptions(rank=_RANK), 0)
    state = run(rule, weight, [torch.zeros(6, 10)])
    for gradient in (slopes((6, 10), 1)[0], torch.zeros(6, 10), slopes((6, 10), 1)[0]):
        before = weight.clone()
        run(rule, weight, [gradient], state, weight_decay=0.0)
        assert bool(weight.isfinite().all())
        assert torch.equal(weight, before) is not bool(gradient.any())


def test_apollo_with_an_orthonormal_projection_scales_as_adam_there() -> None:
    """s = |Adam(P G)| / |P G|, where P is the whole basis; the length of the step is then that of Adam's."""
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(5))).Q

    class Orthonormal(Apollo):
        def _projects(self, weight: torch.Tensor, group: dict[str, Any]) -> bool:
            return True

        def _projection(self, gradient: torch.Tensor, state: dict[str, Any], *, left: bool) -> torch.Tensor:
            return turn

    weight, adam, basis = torch.zeros(6, 10), Adam(), turn.double().numpy()
    options = ApolloOptions(rank=6, scale_type="tensor", norm_growth_limit=None)
    rule, state = Orthonormal(options, 0), None
    for gradient in slopes((6, 10)):
        before = weight.clone()
        state = run(rule, weight, [gradient], state, weight_decay=0.0)
        step = adam(basis.T @ gradient.double().numpy())
        factor = numpy.linalg.norm(step) / numpy.linalg.norm(gradient.double().numpy())
        assert numpy.abs((weight - before).double().numpy() + _RATE * factor * gradient.double().numpy()).max() <= 1e-6
        assert float((weight - before).norm()) == pytest.approx(_RATE * numpy.linalg.norm(step), rel=1e-5)


def test_a_channel_without_gradient_does_not_move() -> None:
    step, projected = torch.ones(3, 4), torch.ones(3, 4)
    projected[:, 2] = 0
    assert torch.equal(ratios(step, projected, "channel", left=True), torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_projections_are_the_same_on_every_rank_and_new_after_the_gap() -> None:
    gradient, options = torch.zeros(6, 10), ApolloOptions(rank=_RANK, update_proj_gap=_GAP)
    first, second = (
        [drawn(Apollo(options, 3), gradient, step, True) for step in range(1, 18)],
        [drawn(Apollo(options, 3), gradient, step, True) for step in range(1, 18)],
    )
    assert all(numpy.array_equal(one, other) for one, other in zip(first, second, strict=True))
    changes = [step for step in range(1, 17) if not numpy.array_equal(first[step], first[step - 1])]
    assert changes == [8, 16]
    assert not numpy.array_equal(first[0], drawn(Apollo(options, 4), gradient, 1, True))
    many = drawn(Apollo(ApolloOptions(rank=500), 3), torch.zeros(1000, 2000), 1, True)
    assert numpy.mean(many**2) * 500 == pytest.approx(1, rel=0.01), "variance 1 / rank"
    before = torch.random.get_rng_state()
    run(Apollo(options, 3), torch.zeros(6, 10), slopes((6, 10)))
    assert torch.equal(torch.random.get_rng_state(), before), "training's own random numbers are left alone"


@pytest.mark.parametrize("shape", [(10,), (3, 10), (4, 6, 5), ()], ids=str)
@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_what_is_not_projected_moves_by_adamw(shape: tuple[int, ...], name: str) -> None:
    """Vectors, tensors of more dimensions, and matrices no wider than the rank."""
    rule: Any = GaLore(GaLoreOptions(rank=3)) if name == "galore" else Apollo(ApolloOptions(rank=3), 0)
    weight = torch.full(shape, 0.5)
    other = torch.nn.Parameter(weight.clone())
    adamw = torch.optim.AdamW([other], lr=_RATE, weight_decay=_DECAY)
    for gradient in slopes(shape):
        other.grad = gradient
        adamw.step()
    run(rule, weight, slopes(shape))
    assert (weight - other.detach()).abs().max() <= 1e-6


def tiny(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, "tie_word_embeddings": False, **changes}))


def made(name: str, model: Any, **options: Any) -> Any:
    found = plugin.optimizer(name)
    groups = [{"params": list(model.parameters()), "weight_decay": _DECAY}]
    setting = plugin.Setting(model=model, seed=3)
    return found.build(groups, learning_rate=_RATE, options=found.Options(**options), setting=setting)


def kept_bytes(state: dict[str, Any]) -> int:
    """Count the bytes of a state but for single numbers."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in tensors)


def teach(optimizer: Any, model: Any, steps: int, start: int = 0) -> None:
    noise = torch.Generator().manual_seed(start)
    for _ in range(steps):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=noise).to(weight.dtype)
        optimizer.step()


PROJECTED = ["galore_adamw", "apollo_adamw"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("rank", [1, 8, 16, 40])
def test_declared_state_is_counted_state(name: str, rank: int, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    optimizer = made(name, model, rank=rank)
    teach(optimizer, model, 1)
    found = plugin.optimizer(name)
    for called, weight in model.named_parameters():
        hidden = "embed" not in called and "lm_head" not in called
        declared = found.state_bytes(plugin.TrainedTensor(tuple(weight.shape), hidden=hidden), found.Options(rank=rank))
        assert kept_bytes(optimizer.state[weight]) == declared, called
        if not hidden or weight.ndim == 1 or rank == 40:
            assert declared == 8 * weight.numel()


@pytest.mark.parametrize("name", [*PROJECTED, "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_the_figure_is_that_of_the_matrix_it_names(name: str) -> None:
    found = plugin.optimizer(name)
    assert "4096 x 4096 matrix at rank 128" in found.state_bytes_note
    counted = found.state_bytes(plugin.TrainedTensor((4096, 4096)), found.Options())
    assert counted == found.state_bytes_per_parameter * 4096**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROJECTED)
def test_a_resumed_run_has_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """10 steps, a checkpoint as a file, 10 more: as 20, where projections were made anew in between."""
    options = {"rank": 8, "update_proj_gap": 6}
    torch.manual_seed(0)
    start = {called: weight.to(dtype) for called, weight in tiny().state_dict().items()}

    def model() -> Any:
        fresh = tiny().to(dtype)
        fresh.load_state_dict(start)
        return fresh

    whole = model()
    optimizer = made(name, whole, **options)
    teach(optimizer, whole, 10, 1)
    teach(optimizer, whole, 10, 2)
    first = model()
    optimizer = made(name, first, **options)
    teach(optimizer, first, 10, 1)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = model()
    second.load_state_dict(saved["model"])
    optimizer = made(name, second, **options)
    optimizer.load_state_dict(saved["optimizer"])
    teach(optimizer, second, 10, 2)
    for called, weight in whole.state_dict().items():
        assert torch.equal(weight, second.state_dict()[called]), called
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert {value.dtype for value in tensors} == {torch.float32}


def test_a_gradient_that_is_no_number_is_no_traceback() -> None:
    weight = torch.ones(6, 10)
    run(GaLore(GaLoreOptions(rank=_RANK)), weight, [torch.full((6, 10), torch.nan)])
    assert not bool(weight.isfinite().all())


@pytest.mark.parametrize("name", PROJECTED)
def test_bfloat16_weights_move_by_less_than_they_can_show(name: str) -> None:
    """Rounded by chance, many steps of 1e-5 add up in a weight of 1 whose neighbours are 0.004 away."""
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    found = plugin.optimizer(name)
    options = found.Options(rank=8, scale=1)
    groups = [{"params": [weight], "weight_decay": 0.0}]
    optimizer = found.build(groups, learning_rate=1e-4, options=options, setting=plugin.Setting())
    exact = torch.nn.Parameter(torch.ones(64, 64))
    reference = found.build(
        [{"params": [exact], "weight_decay": 0.0}], learning_rate=1e-4, options=options, setting=plugin.Setting()
    )
    for _ in range(50):
        weight.grad, exact.grad = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64)
        optimizer.step()
        reference.step()
    moved = float((1 - exact.detach()).mean())
    assert moved > 1e-5
    assert float((1 - weight.detach().float()).mean()) == pytest.approx(moved, rel=0.2)


@pytest.mark.parametrize("name", PROJECTED)
def test_inside_backward_it_is_the_same(name: str) -> None:
    """Bit for bit, over a new projection, and no gradient is left."""
    options = {"rank": 8, "update_proj_gap": 3}
    torch.manual_seed(0)
    kept, fused = tiny().bfloat16(), tiny().bfloat16()
    fused.load_state_dict(kept.state_dict())
    optimizers = made(name, kept, **options), made(f"{name}_layerwise", fused, **options)
    noise = torch.Generator().manual_seed(4)
    for _ in range(5):
        ids = torch.randint(0, 260, (2, 12), generator=noise)
        kept(input_ids=ids, labels=ids).loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        optimizers[1].backward(fused(input_ids=ids, labels=ids).loss)
        assert all(weight.grad is None for weight in fused.parameters())
        optimizers[1].step()
    for called, weight in kept.state_dict().items():
        assert torch.equal(weight, fused.state_dict()[called]), called
    optimizers[1].remove()
