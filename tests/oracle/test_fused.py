"""Updates inside backward against optimizers that keep their gradients: torch's, Hugging Face's, and plain loops."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.optimization import Adafactor

from ftune import plugin
from ftune.fused.adafactor import AdafactorRule
from ftune.fused.engine import FusedBackward
from ftune.fused.kept import RuleOptimizer
from ftune.fused.rounding import Rounding
from ftune.fused.rule import SLICE
from ftune.fused.sgd import SGDRule

FUSED = [name for name in plugin.names(plugin.OPTIMIZERS) if plugin.optimizer(name).gradients is plugin.Gradients.FUSED]
OWN = ["lomo", "adalomo", "adamw_fused_backward", "adafactor_fused_backward"]


class Net(nn.Module):
    """A model with tensors of 0 to 4 dimensions, an embedding that is tied or not, and checkpointing if asked."""

    def __init__(self, *, tied: bool = True, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.words = nn.Embedding(40, 12)
        self.gate = nn.Parameter(torch.tensor(0.7))
        self.experts = nn.Parameter(torch.randn(3, 12, 12) / 4)
        self.kernel = nn.Parameter(torch.randn(2, 3, 2, 2) / 2)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)) for _ in range(3)])
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 40, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.words(ids)
        for layer in self.layers:
            hidden = hidden + (
                checkpoint(layer, hidden, use_reentrant=False) if self.checkpointed else layer(hidden)
            )  # fmt: skip
        hidden = hidden + self.gate * torch.einsum("bld,edf->blf", hidden, self.experts) * self.kernel.square().mean()
        return self.head(self.norm(hidden))


def batches(count: int, rows: int = 4) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (rows, 9), generator=noise) for _ in range(count)]


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids)[:, :-1].float()
    return nn.functional.cross_entropy(logits.reshape(-1, 40), ids[:, 1:].reshape(-1))


def groups_of(model: nn.Module, decay: float = 0.0) -> list[dict[str, Any]]:
    if not decay:
        return [{"params": list(model.parameters()), "weight_decay": 0.0}]
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    rest = [weight for weight in model.parameters() if weight.dim() < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def built(name: str, model: nn.Module, rate: float, *, decay: float = 0.0, norm: float = 0.0, **options: Any) -> Any:
    found = plugin.optimizer(name)
    setting = plugin.Setting(model=model, seed=3, max_grad_norm=norm, scales_loss=options.pop("scales_loss", False))
    return found.build(groups_of(model, decay), learning_rate=rate, options=found.Options(**options), setting=setting)


def fused_run(model: nn.Module, optimizer: Any, rows: list[torch.Tensor]) -> list[float]:
    norms = []
    for ids in rows:
        optimizer.backward(loss_of(model, ids), last=True)
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return norms


def kept_run(model: nn.Module, optimizer: Any, rows: list[torch.Tensor], norm: float = 0.0) -> list[float]:
    norms = []
    for ids in rows:
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), norm or math.inf)))
        optimizer.step()
    return norms


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_lomo_has_the_bits_of_sgd(tied: bool, checkpointed: bool) -> None:
    ours, theirs = Net(tied=tied, checkpointed=checkpointed), Net(tied=tied, checkpointed=checkpointed)
    rows = batches(20)
    fused_run(ours, built("lomo", ours, 0.1), rows)
    kept_run(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), rows)
    assert difference(ours, theirs) == 0.0
    assert difference(ours, Net(tied=tied)) > 0.05


@pytest.mark.parametrize("checkpointed", [True, False])
def test_clipping_by_the_global_norm_takes_two_passes_and_is_torchs(checkpointed: bool) -> None:
    ours, theirs = Net(checkpointed=checkpointed), Net()
    rows = batches(20)
    norms = fused_run(ours, built("lomo", ours, 0.5, norm=0.3), rows)
    assert kept_run(theirs, torch.optim.SGD(theirs.parameters(), lr=0.5), rows, norm=0.3) == pytest.approx(norms, 1e-6)
    assert min(norms) > 0.3, "every step is clipped"
    assert difference(ours, theirs) <= 1e-7


def test_the_norm_is_told_without_clipping_too() -> None:
    ours, theirs = Net(), Net()
    norms = fused_run(ours, built("adalomo", ours, 1e-3), batches(1))
    assert kept_run(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), batches(1)) == pytest.approx(norms, 1e-6)


def test_clipping_by_value_and_of_each_tensor() -> None:
    for options in ({"clip_grad_value": 0.01}, {"clip_grad_norm_per_tensor": 0.02}):
        ours, theirs = Net(), Net()
        rows = batches(5)
        fused_run(ours, built("lomo", ours, 0.5, **options), rows)
        for ids in rows:
            theirs.zero_grad()
            loss_of(theirs, ids).backward()
            with torch.no_grad():
                for weight in theirs.parameters():
                    slope = weight.grad
                    if "clip_grad_value" in options:
                        slope = slope.clamp(-0.01, 0.01)
                    else:
                        slope = slope * min(1.0, 0.02 / (float(slope.norm()) + 1e-6))
                    weight -= 0.5 * slope
        assert difference(ours, theirs) <= 1e-6


def test_decay_is_decoupled_and_the_groups_own() -> None:
    ours, theirs = Net(), Net()
    rows = batches(10)
    fused_run(ours, built("lomo", ours, 0.1, decay=0.2), rows)
    for ids in rows:
        theirs.zero_grad()
        loss_of(theirs, ids).backward()
        with torch.no_grad():
            for weight in theirs.parameters():
                weight.mul_(1 - 0.1 * 0.2 if weight.dim() >= 2 else 1.0).sub_(0.1 * weight.grad)
    assert difference(ours, theirs) <= 1e-6
    assert difference(ours, Net()) > 0.1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adalomo_is_adafactor_scaled_by_the_weights(decay: float) -> None:
    ours, theirs = Net(), Net()
    rows = batches(20)
    fused_run(ours, built("adalomo", ours, 2e-3, decay=decay), rows)
    settings = {"scale_parameter": True, "relative_step": False, "warmup_init": False, "beta1": None}
    kept_run(
        theirs, Adafactor(groups_of(theirs, decay), lr=2e-3, clip_threshold=1.0, decay_rate=-0.8, **settings), rows
    )
    assert difference(ours, theirs) <= 1e-6
    assert difference(ours, Net()) > 0.01


def test_adafactor_inside_backward_is_adafactor() -> None:
    ours, theirs = Net(), Net()
    rows = batches(20)
    fused_run(ours, built("adafactor_fused_backward", ours, 1e-3), rows)
    found = plugin.optimizer("adafactor")
    options = {"learning_rate": 1e-3, "options": found.Options(), "setting": plugin.Setting()}
    kept_run(theirs, found.build(groups_of(theirs), **options), rows)
    assert difference(ours, theirs) <= 1e-6


def test_adamw_inside_backward_is_adamw() -> None:
    ours, theirs = Net(), Net()
    rows = batches(20)
    fused_run(ours, built("adamw_fused_backward", ours, 1e-2, decay=0.1), rows)
    kept_run(theirs, torch.optim.AdamW(groups_of(theirs, 0.1), lr=1e-2), rows)
    assert difference(ours, theirs) <= 1e-6


def test_a_gradient_a_thousand_times_as_large_changes_nothing_for_adalomo() -> None:
    one, other = Net(), Net()
    first, second = built("adalomo", one, 1e-2), built("adalomo", other, 1e-2)
    for ids in batches(10):
        first.backward(loss_of(one, ids))
        second.backward(1000 * loss_of(other, ids))
        first.step()
        second.step()
    assert difference(one, other) <= 1e-5


@pytest.mark.parametrize("name", OWN)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(name: str) -> None:
    """In bfloat16, where rounding by chance has to go on as well; with a change of the rate on the way."""
    rows = batches(20)

    def run(model: nn.Module, optimizer: Any, rows: list[torch.Tensor], first: int) -> None:
        for step, ids in enumerate(rows, first):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            fused_run(model, optimizer, [ids])

    whole = Net().bfloat16()
    run(whole, built(name, whole, 1e-2), rows, 0)
    first = Net().bfloat16()
    optimizer = built(name, first, 1e-2)
    run(first, optimizer, rows[:10], 0)
    saved = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    second = Net().bfloat16()
    second.load_state_dict(loaded["model"])
    optimizer = built(name, second, 1e-2)
    optimizer.load_state_dict(loaded["optimizer"])
    assert all(value.dtype == torch.float32 for state in optimizer.state.values() for value in state.values()
               if isinstance(value, torch.Tensor))  # fmt: skip
    run(second, optimizer, rows[10:], 10)
    assert difference(whole, second) == 0.0


def test_after_an_overflow_nothing_moved_the_scale_is_halved_and_the_next_step_moves() -> None:
    model = Net().half()
    before = copy.deepcopy(model)
    optimizer = built("lomo", model, 0.1, norm=1.0, scales_loss=True)
    assert optimizer.scale == 2.0**16
    ids = batches(1)[0]
    optimizer.backward(loss_of(model, ids) * 1e4, last=True)
    optimizer.step()
    assert optimizer.skipped
    assert difference(model, before) == 0.0
    assert optimizer.scale == 2.0**15
    while optimizer.skipped:
        optimizer.backward(loss_of(model, ids), last=True)
        optimizer.step()
    assert difference(model, before) > 0
    plain = Net().half().float()
    plain.load_state_dict(before.float().state_dict())
    loss_of(plain, ids).backward()
    expected = float(nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
    assert float(optimizer.grad_norm) == pytest.approx(expected, rel=2e-2)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert difference(model, plain) <= 2e-3


def test_the_loss_scale_grows_again() -> None:
    model = nn.Linear(1, 1)
    optimizer = FusedBackward([{"params": [model.weight]}], SGDRule(), learning_rate=0.0, seed=0, scales_loss=True)
    for _ in range(1000):
        optimizer.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
    assert optimizer.scale == 2.0**17
    other = FusedBackward([{"params": [model.weight]}], SGDRule(), learning_rate=0.0, seed=0, scales_loss=True)
    other.load_state_dict(optimizer.state_dict())
    assert (other.scale, other.good_steps, other.steps) == (2.0**17, 1000, 1000)


class TestAccumulation:
    def steps(self, optimizer: Any, model: nn.Module, rows: list[torch.Tensor]) -> None:
        for start in range(0, len(rows), 4):
            micro = rows[start : start + 4]
            for place, ids in enumerate(micro):
                optimizer.backward(loss_of(model, ids) / 4, last=place == 3)
            optimizer.step()

    @pytest.mark.parametrize("norm", [0.0, 0.2])
    @pytest.mark.parametrize("checkpointed", [True, False])
    @pytest.mark.parametrize("name", ["lomo", "adalomo"])
    @pytest.mark.parametrize(
        "options", [{"accumulate": "forward"}, {"accumulate": "buffer", "buffer": "host"}], ids=str
    )
    def test_four_micro_batches_are_one_batch(
        self, options: dict[str, Any], name: str, checkpointed: bool, norm: float
    ) -> None:
        ours, theirs = Net(checkpointed=checkpointed), Net()
        rows = batches(20)
        optimizer = built(name, ours, 1e-2, norm=norm, **options)
        self.steps(optimizer, ours, rows)
        other = built(name, theirs, 1e-2, norm=norm)
        fused_run(theirs, other, [torch.cat(rows[start : start + 4]) for start in range(0, 20, 4)])
        assert difference(ours, theirs) <= 1e-6
        assert float(optimizer.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-5)

    def test_a_buffer_of_16_bits_is_right_on_average(self) -> None:
        weight = nn.Parameter(torch.zeros(20000))
        optimizer = FusedBackward(
            [{"params": [weight]}], SGDRule(), learning_rate=1.0, seed=0, accumulate="buffer", buffer="bfloat16"
        )
        # One large share and many that are below its rounding step: to the nearest, they would all be lost.
        shares = [1.0] + [1e-3] * 31
        for place, share in enumerate(shares):
            optimizer.backward((weight * share).sum(), last=place == 31)
        optimizer.step()
        # 31 roundings of at most half a step of 2 ** -7, in 20,000 elements: five times the spread of their mean.
        spread = math.sqrt(31 / 20000) * 2**-8
        assert float(-weight.detach().mean()) == pytest.approx(sum(shares), abs=5 * spread)

    def test_without_it_a_second_micro_batch_is_an_error(self) -> None:
        model = Net()
        with pytest.raises(RuntimeError, match="cannot be accumulated"):
            built("lomo", model, 0.1).backward(loss_of(model, batches(1)[0]), last=False)


class Alive(TorchDispatchMode):
    """The most bytes that are alive at once of tensors as large as a gradient, without those that were there before."""

    def __init__(self, size: int, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.size, self.most, self._made = size, 0, []
        self._before = {tensor.untyped_storage().data_ptr() for tensor in before}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        made = operation(*arguments, **(named or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().nbytes() == self.size
                and tensor.untyped_storage().data_ptr() not in self._before
            ):
                self._made.append(StorageWeakRef(tensor.untyped_storage()))
        self._made = list({ref.cdata: ref for ref in self._made if not ref.expired()}.values())
        self.most = max(self.most, self.size * len(self._made))
        return made


@pytest.mark.parametrize("norm", [0.0, 1.0])
@pytest.mark.parametrize("name", FUSED)
def test_gradients_are_never_all_alive(name: str, norm: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])
    optimizer = built(name, model, 1e-3, norm=norm)
    size = 64 * 64 * 4
    for _ in range(2):  # the first step makes the state as well
        loss = model(torch.randn(8, 64)).square().sum()
        state = [value for each in optimizer.state.values() for value in each.values()]
        with Alive(size, [*model.parameters(), *filter(torch.is_tensor, state)]) as alive:
            optimizer.backward(loss)
            optimizer.step()
    temporary = 1 if plugin.optimizer(name).state_bytes_per_parameter else 0
    assert 0 < alive.most <= (2 + temporary) * size, "the gradient, and float32 arithmetic on it"
    optimizer.remove()
    loss = model(torch.randn(8, 64)).square().sum()
    with Alive(size, model.parameters()) as every:
        loss.backward()
    assert every.most >= 12 * size, "kept gradients are seen as such"


@pytest.mark.parametrize("checkpointed", [True, False])
def test_several_graphs_are_walked_side_by_side(checkpointed: bool) -> None:
    model = nn.ModuleList([nn.Linear(64, 64) for _ in range(12)])

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        for layer in model:
            hidden = checkpoint(layer, hidden, use_reentrant=False) if checkpointed else layer(hidden)
            hidden = hidden.relu()
        return hidden.square().sum()

    optimizer = built("lomo", model, 1e-3, accumulate="forward")
    order: list[int] = []
    for place, layer in enumerate(model):
        layer.weight.register_hook(lambda _, place=place: order.append(place))
    reached: list[int] = []
    for last in (False, False, True):
        hidden = torch.randn(8, 64, requires_grad=True)
        hidden.register_hook(lambda _: reached.append(len(order)))
        optimizer.backward(forward(hidden), last=last)
    assert order == list(range(11, -1, -1)), "each gradient is whole before that of the layer below"
    # The inputs are reached when all but at most the last layer's gradient was used.
    assert min(reached) >= 11


def test_a_backward_that_is_not_its_own_is_left_alone() -> None:
    model = Net()
    optimizer = built("adalomo", model, 1e-2)
    loss_of(model, batches(1)[0]).backward()
    assert all(weight.grad is not None for weight in model.parameters())
    model.zero_grad()
    fused_run(model, optimizer, batches(2))
    assert all(torch.isfinite(weight).all() and weight.grad is None for weight in model.parameters())


def test_an_error_inside_backward_leaves_the_hooks_quiet() -> None:
    model = Net()
    optimizer = built("lomo", model, 1e-2)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        optimizer.backward(Broken.apply(loss_of(model, batches(1)[0])))
    loss_of(model, batches(1)[0]).backward()
    assert model.words.weight.grad is not None


class TestRounding:
    def test_by_chance_it_is_right_on_average_and_one_of_the_two_neighbours(self) -> None:
        noise = torch.Generator().manual_seed(0)
        values = torch.randn(50, generator=noise) * 10.0 ** torch.randint(-30, 30, (50,), generator=noise)
        rounding, total = Rounding("stochastic", 1), torch.zeros(50, dtype=torch.float64)
        for step in range(4000):
            rounding.begin(step, 0)
            kept = torch.empty(50, dtype=torch.bfloat16)
            rounding.write(kept, values.clone())
            down = (values.view(torch.int32) & -65536).view(torch.float32)
            up = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
            assert ((kept.float() == down) | (kept.float() == up)).all()
            total += kept.double()
        step_size = values.abs().double() * 2**-7
        # The mean of 4,000 draws is off by at most half a step over its root: five times that is beyond chance.
        assert ((total / 4000 - values.double()).abs() <= 5 * step_size / 2 / math.sqrt(4000)).all()

    def test_what_bfloat16_holds_stays_and_the_extremes_too(self) -> None:
        largest = torch.finfo(torch.float32).max
        values = torch.tensor([0.0, -0.0, 1.0, -3.5, math.inf, -math.inf, math.nan, 2.0**-126, largest])
        kept = torch.empty(len(values), dtype=torch.bfloat16)
        for step in range(50):
            rounding = Rounding("stochastic", 1)
            rounding.begin(step, 0)
            rounding.write(kept, values.clone())
            assert kept[:6].tolist() == values[:6].tolist()
            assert math.isnan(kept[6])
            assert kept[7] == values[7]
            assert kept[8] in (torch.finfo(torch.bfloat16).max, math.inf)

    def test_the_seed_the_step_and_the_tensor_decide(self) -> None:
        def drawn(seed: int, step: int, tensor: int) -> torch.Tensor:
            rounding, kept = Rounding("stochastic", seed), torch.empty(1000, dtype=torch.bfloat16)
            rounding.begin(step, tensor)
            rounding.write(kept, torch.full((1000,), 1.003))
            return kept

        assert torch.equal(drawn(1, 2, 3), drawn(1, 2, 3))
        others = [drawn(2, 2, 3), drawn(1, 3, 3), drawn(1, 2, 4), drawn(1, 3, 2)]
        assert not any(torch.equal(drawn(1, 2, 3), other) for other in others)

    @pytest.mark.parametrize("name", OWN)
    def test_small_updates_count_in_bfloat16(self, name: str) -> None:
        """A constant slope, and a rate at which every update is below the rounding step of a weight of 1."""

        def moved(rounding: str) -> float:
            weight = nn.Parameter(torch.ones(400, 100, dtype=torch.bfloat16))
            optimizer = built(name, nn.ParameterList([weight]), 1e-4, rounding=rounding)
            for _ in range(50):
                optimizer.backward(weight.float().sum())
                optimizer.step()
            return 1 - float(weight.detach().double().mean())

        assert moved("nearest") == 0.0
        assert moved("stochastic") == pytest.approx(50e-4, rel=0.05)


@pytest.mark.parametrize("name", OWN)
def test_weights_of_16_bits_are_computed_in_float32_a_slice_at_a_time(name: str) -> None:
    """Two tensors, one of them of several slices, against the same rule on float32 copies rounded to the nearest."""
    noise = torch.Generator().manual_seed(0)
    shapes = [(3 * SLICE // 700 + 5, 700), (90,)]
    values = [torch.randn(shape, generator=noise).bfloat16() for shape in shapes]
    slopes = [torch.randn(shape, generator=noise).bfloat16() for shape in shapes]

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        weights = [nn.Parameter(value.to(dtype, copy=True)) for value in values]
        optimizer = built(name, nn.ParameterList(weights), 1e-1, decay=0.1, rounding="nearest")
        optimizer.backward(sum((w * s.to(dtype)).sum() for w, s in zip(weights, slopes, strict=True)))
        optimizer.step()
        return [weight.detach() for weight in weights]

    for ours, exact in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        apart = (ours.float() - exact).abs()
        assert (apart <= exact.abs() * 2**-8 * 1.001 + 1e-7).all()


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_columns_without_gradients_stay(dtype: torch.dtype, size: float) -> None:
    """As in an embedding, of which a batch holds a few words, and with gradients of any size."""
    noise = torch.Generator().manual_seed(0)
    slope = torch.zeros(7, 5)
    slope[2:4, 1:] = size * torch.randn(2, 4, generator=noise)
    weight = nn.Parameter(torch.randn(7, 5, generator=noise).to(dtype))
    before = weight.detach().clone()
    optimizer = built("adalomo", nn.ParameterList([weight]), 1e-1, rounding="nearest")
    for _ in range(3):
        optimizer.backward((weight * slope.to(dtype)).sum())
        optimizer.step()
    assert torch.isfinite(weight).all()
    still = slope == 0
    assert torch.equal(weight.detach()[still], before[still])
    assert (weight.detach()[~still] != before[~still]).all()


def test_rows_shared_by_two_ranks_move_as_the_whole_matrix() -> None:
    noise = torch.Generator().manual_seed(0)
    matrix, vector = torch.randn(9, 6, generator=noise), torch.randn(7, generator=noise)
    whole = [matrix.clone(), vector.clone()]
    halves = [[matrix[:5].clone(), vector[:4].clone()], [matrix[5:].clone(), vector[4:].clone()]]  # unequal ones
    settings = {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "scale_parameter": True}
    group, rounding = {"lr": 0.1, "weight_decay": 0.1}, Rounding("nearest", 0)
    alone = AdafactorRule(**settings)
    states = [alone.fresh(weight) for weight in whole]
    split = [[alone.fresh(weight) for weight in half] for half in halves]
    for _ in range(6):
        slopes = [torch.randn(9, 6, generator=noise), torch.randn(7, generator=noise)]
        for weight, slope, state in zip(whole, slopes, states, strict=True):
            alone.update(weight, slope.clone(), state, group, rounding, weight.shape)
        for number in range(2):
            parts = [slope.chunk(2)[rank] for rank in range(2) for slope in [slopes[number]]]
            _together([half[number] for half in halves], parts, [half[number] for half in split], settings, group)
    assert torch.allclose(torch.cat([halves[0][0], halves[1][0]]), whole[0], rtol=0, atol=1e-6)
    assert torch.allclose(torch.cat([halves[0][1], halves[1][1]]), whole[1], rtol=0, atol=1e-6)
    assert not torch.allclose(whole[0], matrix, atol=0.1)


def _together(
    weights: list[torch.Tensor], slopes: list[torch.Tensor], states: list[Any], settings: Any, group: Any
) -> None:
    """Move two ranks' parts at once, in threads that wait for each other at every sum."""
    import threading

    barrier, sums = threading.Barrier(2), [torch.zeros(()), torch.zeros(())]

    def add_up(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def summed(tensor: torch.Tensor) -> torch.Tensor:
            sums[rank] = tensor
            barrier.wait()
            total = sums[0] + sums[1]
            barrier.wait()
            return total

        return summed

    def move(rank: int) -> None:
        rule, weight = AdafactorRule(**settings, add_up=add_up(rank)), weights[rank]
        shape = torch.Size([sum(len(part) for part in weights), *weight.shape[1:]])
        rule.update(weight, slopes[rank].clone(), states[rank], group, Rounding("nearest", 0), shape)

    threads = [threading.Thread(target=move, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("name", OWN)
def test_state_bytes_are_those_declared(name: str) -> None:
    model = nn.Linear(300, 200, bias=False)
    optimizer = built(name, model, 1e-3)
    optimizer.backward(model(torch.randn(2, 300)).sum())
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    declared = plugin.optimizer(name).state_bytes_per_parameter * 300 * 200
    factored = 4 * (300 + 200) if "ada" in name and "adamw" not in name else 0
    assert sum(value.numel() * value.element_size() for value in state) == declared + factored


def test_the_rule_over_kept_gradients_is_the_rule_inside_backward() -> None:
    ours, theirs = Net().bfloat16(), Net().bfloat16()
    fused = built("adalomo", ours, 1e-2)
    kept = RuleOptimizer(groups_of(theirs), fused.rule, learning_rate=1e-2, seed=3)
    rows = batches(5)
    fused_run(ours, fused, rows)
    for ids in rows:
        kept.zero_grad()
        loss_of(theirs, ids).backward()
        kept.step()
    assert difference(ours, theirs) == 0.0
