"""Training with forward passes against closed forms, a plain loop with copies, and its own log."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from torch.nn import functional
from training_runs import ROOT, no_rows, recipe, rows_file, same_bits, weights
from training_runs import losses as losses_of_run
from zeroth_runs import Small, batches, bits, grouped, loss_of, made, same, small, take

import ftune
from ftune import plugin
from ftune.cli.rebuild import rebuild
from ftune.errors import RecipeError, RunError
from ftune.machine import probe
from ftune.training import resuming
from ftune.training.run import train
from ftune.zeroth import log
from ftune.zeroth.points import Points, step_seed
from ftune.zeroth.replay import replay

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def plain(model: torch.nn.Module, rows: list[torch.Tensor], *, rate: float, eps: float) -> None:
    """MeZO with whole copies of the model, the initial weights and one for each point; rounded to nearest."""
    weights = [weight for group in grouped(model) for weight in group["params"]]
    decays = [group["weight_decay"] for group in grouped(model) for _ in group["params"]]
    points, rate = Points("nearest"), torch.tensor(rate).item()
    for step, tokens in enumerate(rows):
        seed = step_seed(7, step)
        directions = [
            torch.cat([z for _, z in points.directions(weight, None, seed=seed, number=number)]).view_as(weight)
            for number, weight in enumerate(weights)
        ]
        start = [weight.detach().clone() for weight in weights]
        losses = []
        for sign in (1, -1):
            for weight, old, z in zip(weights, start, directions, strict=True):
                weight.data = (old.float() + sign * eps * z).to(old.dtype)
            with torch.no_grad():
                losses.append(loss_of(model, tokens)().item())
        gradient = torch.tensor((losses[0] - losses[1]) / (2 * eps), dtype=torch.float32).item()
        for weight, old, z, decay in zip(weights, start, directions, decays, strict=True):
            weight.data = (old.float() - rate * (gradient * z + decay * old.float())).to(old.dtype)


class Quadratic(torch.nn.Module):
    """L = theta A theta / 2 + b theta, in float64."""

    def __init__(self) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        matrix = torch.randn(40, 40, generator=noise, dtype=torch.float64)
        self.matrix, self.shift = matrix + matrix.T, torch.randn(40, generator=noise, dtype=torch.float64)
        self.theta = torch.nn.Parameter(torch.randn(40, generator=noise, dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return self.theta @ self.matrix @ self.theta / 2 + self.shift @ self.theta


class TestEstimate:
    @pytest.mark.parametrize("name", ["mezo", "sparse_mezo"])
    @pytest.mark.parametrize("eps", [1e-3, 1.0])
    def test_is_exact_on_a_quadratic(self, name: str, eps: float) -> None:
        """A central difference has no error where the third derivative is zero: g = z (A theta + b)."""
        model = Quadratic()
        optimizer = made(model, name, eps=eps, **({"density": 1.0} if name == "sparse_mezo" else {}))
        gradient = model.matrix @ model.theta.detach() + model.shift
        seed = step_seed(7, 0)
        z = torch.cat([z for _, z in Points("nearest").directions(model.theta, None, seed=seed, number=0)]).double()
        optimizer.learn(model)
        assert optimizer.grad_norm == pytest.approx(abs(float(z @ gradient)), rel=1e-9)
        before = model.theta.detach().clone()
        optimizer.step()
        expected = before - torch.tensor(1e-2).item() * torch.tensor(float(z @ gradient)).item() * z
        torch.testing.assert_close(model.theta.detach(), expected, rtol=1e-9, atol=1e-9)

    def test_is_the_gradient_on_average(self) -> None:
        """E[g z] = grad L (Malladi et al., 2023, section 2): for many z to within what chance leaves."""
        model = Quadratic()
        gradient = model.matrix @ model.theta.detach() + model.shift
        points, total, count = Points("nearest"), torch.zeros(40, dtype=torch.float64), 4000
        for step in range(count):
            (_, z), *_ = points.directions(model.theta, None, seed=step_seed(1, step), number=0)
            total += z.double() * float(z.double() @ gradient)
        error = (total / count - gradient).norm() / gradient.norm()
        assert error < 3 * math.sqrt(41 / count)

    def test_directions_are_standard_normal_and_apart(self) -> None:
        weight = torch.zeros(1 << 18)
        points = Points("nearest")
        draws = [
            next(points.directions(weight, None, seed=seed, number=number))[1] for seed in (0, 1) for number in (0, 1)
        ]
        for one in draws:
            assert abs(float(one.mean())) < 0.01
            assert abs(float(one.std()) - 1) < 0.01
        correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
        assert correlation.abs().max() < 0.01

    def test_large_bfloat16_weights_are_told_their_gradient(self) -> None:
        """At 1.5 a step of bfloat16 is 0.0078: to nearest, 0.001 z never leaves the weight, and it learns nothing."""
        weight = torch.full((64,), 1.5, dtype=torch.bfloat16)
        slope, count, eps = torch.linspace(-1, 1, 64, dtype=torch.float64), 2000, 1e-3
        found = {}
        for kind in ("stochastic", "nearest"):
            points, total = Points(kind), torch.zeros(64, dtype=torch.float64)
            for step in range(count):
                seed = step_seed(2, step)
                values = []
                for distance in (eps, -eps):
                    ((_, new),) = points.at(weight, None, seed=seed, number=0, distance=distance)
                    values.append(new.double())
                torch.testing.assert_close(values[0] + values[1], 2 * weight.double(), rtol=0, atol=0)
                (_, z), *_ = points.directions(weight, None, seed=seed, number=0)
                total += z.double() * float(slope @ (values[0] - values[1]) / (2 * eps))
            found[kind] = float(torch.dot(total / count, slope) / slope.dot(slope))
        assert found["nearest"] == pytest.approx(0.0, abs=0.01)
        assert found["stochastic"] == pytest.approx(1.0, abs=0.15)


class TestExactness:
    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    @pytest.mark.parametrize("name", ["mezo", "sparse_mezo"])
    def test_a_thousand_points_change_no_bit(self, name: str, dtype: torch.dtype) -> None:
        model = small(dtype)
        before, tokens = bits(model), batches(1)[0]
        optimizer = made(model, name, **({"density": 1.0} if name == "sparse_mezo" else {}))
        for _ in range(500):  # two points each
            optimizer.learn(loss_of(model, tokens))
        assert same(before, model)
        assert optimizer.grad_norm > 0

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    def test_no_rate_moves_nothing(self, dtype: torch.dtype) -> None:
        model = small(dtype)
        model.inner.bias.data[0] = -0.0
        before = bits(model)
        take(made(model, rate=0.0), model, batches(5))
        assert same(before, model)

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    def test_equals_a_loop_with_copies(self, dtype: torch.dtype) -> None:
        model, other, rows = small(dtype), small(dtype), batches(30)
        take(made(model, rounding="nearest"), model, rows)
        plain(other, rows, rate=1e-2, eps=1e-3)
        assert not same(small(dtype), model)
        assert same(model, other)

    def test_every_weight_is_where_its_point_says(self) -> None:
        """The first forward sees theta + eps z and the second theta - eps z, of shared weights too."""
        model, tokens = small(), batches(1)[0]
        optimizer = made(model, eps=0.05)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        start = [weight.detach().clone() for weight in weights]
        losses: list[float] = []

        def loss() -> torch.Tensor:
            found = loss_of(model, tokens)()
            losses.append(found.item())
            return found

        optimizer.learn(loss)
        points = Points("nearest")
        for found, distance in zip(losses, (0.05, -0.05), strict=True):
            explicit = small()
            copies = [weight for group in grouped(explicit) for weight in group["params"]]
            for number, (weight, old) in enumerate(zip(copies, start, strict=True)):
                (_, z), *_ = points.directions(old, None, seed=step_seed(7, 0), number=number)
                weight.data = old + distance * z.view_as(old)
            assert found == pytest.approx(loss_of(explicit, tokens)().item(), rel=1e-6)
        assert losses[0] != losses[1]

    def test_accumulation_is_exact(self) -> None:
        """Four batches at each point are one batch four times as large."""
        models = [small(), small()]
        rows = batches(40)
        optimizers = [made(model) for model in models]
        for start in range(0, 40, 4):
            four = rows[start : start + 4]
            parts = [loss_of(models[0], tokens) for tokens in four]
            optimizers[0].learn(lambda parts=parts: torch.stack([part() for part in parts]).mean())
            optimizers[1].learn(loss_of(models[1], torch.cat(four)))
            for optimizer in optimizers:
                optimizer.step()
        for one, two in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)

    def test_the_loss_falls(self) -> None:
        model, tokens = small(), batches(1)[0]
        losses = take(made(model, rate=3e-2), model, [tokens] * 300)
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])

    def test_clipping_bounds_the_slope(self, tmp_path: Path) -> None:
        model = small()
        optimizer = made(model, max_grad_norm=0.01, directory=tmp_path)
        take(optimizer, model, batches(3))
        assert optimizer.grad_norm > 0.01
        assert {abs(entry.gradient) for entry in log.read(tmp_path)[1]} == {log.float32(0.01)}

    def test_global_chance_is_left_alone(self) -> None:
        model = small(torch.bfloat16)
        state = torch.get_rng_state()
        take(made(model), model, batches(3))
        assert torch.equal(state, torch.get_rng_state())

    def test_mixed_precision_sees_each_point(self) -> None:
        """Autocast keeps 16-bit copies of weights; those of the first point must not serve the second."""
        model, tokens = small(), batches(1)[0]
        optimizer = made(model, eps=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = loss_of(model, tokens)().item()
            optimizer.learn(loss_of(model, tokens))
            assert loss_of(model, tokens)().item() == before
        mixed = optimizer.grad_norm
        optimizer.learn(loss_of(model, tokens))
        assert mixed == pytest.approx(optimizer.grad_norm, rel=0.2)


class TestFaults:
    def test_an_error_leaves_nothing_behind(self) -> None:
        model = small()
        before = bits(model)
        optimizer = made(model)

        def broken() -> torch.Tensor:
            model.inner.register_forward_pre_hook(stop)
            return model(batches(1)[0]).sum()

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            optimizer.learn(broken)
        model.inner._forward_pre_hooks.clear()
        assert hooks(model) == 0
        assert same(before, model)
        sparse = made(model, "sparse_mezo", density=1.0)
        with pytest.raises(KeyboardInterrupt):
            sparse.learn(broken)
        model.inner._forward_pre_hooks.clear()
        assert same(before, model)
        optimizer.step()
        assert same(before, model)
        take(optimizer, model, batches(1))
        assert hooks(model) == 0
        assert not same(before, model)

    def test_evaluation_between_steps_sees_the_weights(self) -> None:
        model, tokens = small(), batches(1)[0]
        optimizer = made(model)
        expected = loss_of(small(), tokens)().item()
        optimizer.learn(loss_of(model, tokens))
        assert loss_of(model, tokens)().item() == expected
        optimizer.step()
        assert loss_of(model, tokens)().item() != expected

    def test_one_point_that_is_not_finite_skips_the_step(self, tmp_path: Path) -> None:
        model = small()
        before = bits(model)
        optimizer = made(model, directory=tmp_path)
        values = iter([math.inf, 2.0])
        tokens = batches(1)[0]

        def loss() -> torch.Tensor:
            return loss_of(model, tokens)() * 0 + next(values)

        assert float(optimizer.learn(loss)) == 2.0
        optimizer.step()
        assert (optimizer.skipped, optimizer.steps) == (1, 1)
        assert same(before, model)
        take(optimizer, model, batches(4))
        again = small()
        assert replay(again, tmp_path) == 5
        assert same(again, model)

    def test_two_points_that_are_not_finite_are_the_trainer_s_to_refuse(self) -> None:
        model = small()
        optimizer = made(model)
        tokens = batches(1)[0]
        assert not math.isfinite(float(optimizer.learn(lambda: loss_of(model, tokens)() * math.nan)))

    def test_a_weight_read_past_all_modules_is_refused(self) -> None:
        """A loss that takes the output matrix from the model, as fused losses do, would see it unmoved."""
        model, tokens = small(), batches(1)[0]

        def loss() -> torch.Tensor:
            hidden = model.embed(tokens)
            hidden = model.inner(model.norm(hidden))
            return functional.linear(hidden, model.head.weight).square().mean()

        with pytest.raises(RecipeError, match=r"embed\.weight.*read by the loss itself"):
            made(model).learn(loss)
        assert hooks(model) == 0
        sparse = made(model, "sparse_mezo", density=1.0)
        sparse.learn(loss)
        assert sparse.grad_norm > 0

    def test_a_weight_that_another_module_reads_is_moved_there(self) -> None:
        """Fused kernels take the matrices of their layers without calling these: the estimate is that of all reads."""

        class Fused(Small):
            def forward(self, tokens: torch.Tensor) -> torch.Tensor:
                hidden = self.embed(tokens)
                inner = functional.linear(self.norm(hidden), self.inner.weight, self.inner.bias)
                return functional.linear(hidden + inner.tanh(), self.head.weight)

        model, fused, rows = small(), Fused().eval(), batches(5)
        fused.load_state_dict(model.state_dict())
        assert take(made(fused), fused, rows) == take(made(model), model, rows)
        assert same(fused, model)
        assert hooks(fused) == 0

    def test_a_weight_without_part_in_the_loss_is_refused(self) -> None:
        model = small()
        model.unused = torch.nn.Linear(3, 3)
        with pytest.raises(RecipeError, match=r"unused\.weight.*takes no part"):
            made(model).learn(loss_of(model, batches(1)[0]))

    def test_shape_and_dtype_may_be_asked_for(self) -> None:
        model, tokens = small(), batches(1)[0]

        def loss() -> torch.Tensor:
            assert model.head.weight.dtype == torch.float32
            assert model.inner.weight.new_zeros(2).device == model.inner.weight.device
            return loss_of(model, tokens)()

        made(model).learn(loss)

    def test_weights_in_lists_are_their_holder_s(self) -> None:
        class Listed(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = torch.nn.ModuleDict({"a": torch.nn.ModuleDict()})
                self.each = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(3))})

            def forward(self) -> torch.Tensor:
                return (self.each["a"] * torch.arange(3)).sum()

        model = Listed()
        optimizer = made(model)
        optimizer.learn(model)
        (_, z), *_ = Points("nearest").directions(model.each["a"], None, seed=step_seed(7, 0), number=0)
        assert optimizer.grad_norm == pytest.approx(abs(float(z @ torch.arange(3.0))), rel=1e-3)


class TestLog:
    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    @pytest.mark.parametrize("name", ["mezo", "sparse_mezo"])
    def test_replay_is_the_training(self, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
        model, rows = small(dtype), batches(25)
        optimizer = made(model, name, directory=tmp_path, **({"density": 0.3} if name == "sparse_mezo" else {}))
        if name == "sparse_mezo":
            optimizer.calibrate(lambda: (loss_of(model, tokens)() for tokens in rows[:2]))
        take(optimizer, model, rows[:20])
        half = bits(model)
        take(optimizer, model, rows[20:])
        header, _, entries = (tmp_path / log.NAME).read_bytes().partition(b"\n")
        assert len(entries) == 25 * 12
        assert header.startswith(b"{")
        again = small(dtype)
        assert replay(again, tmp_path) == 25
        assert same(again, model)
        assert not same(small(dtype), model)
        again = small(dtype)
        assert replay(again, tmp_path, 20) == 20
        assert same(half, again)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", ["mezo", "sparse_mezo"])
    def test_a_resumed_run_is_the_whole_one(self, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
        options = {"density": 0.3} if name == "sparse_mezo" else {}
        rows = batches(20)
        model = small(dtype)
        first = made(model, name, directory=tmp_path, **options)
        if name == "sparse_mezo":
            first.calibrate(lambda: (loss_of(model, tokens)() for tokens in rows[:2]))
        take(first, model, rows[:10])
        torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, tmp_path / "saved.pt")
        take(first, model, rows[10:])
        whole = (tmp_path / log.NAME).read_bytes()
        with (tmp_path / log.NAME).open("ab") as out:
            out.write(b"torn")
        found = torch.load(tmp_path / "saved.pt", weights_only=True)
        resumed = small(dtype)
        resumed.load_state_dict(found["model"])
        second = made(resumed, name, directory=tmp_path, **options)
        second.load_state_dict(copy.deepcopy(second.state_dict()))  # accelerate does so to move states to the device
        second.load_state_dict(found["optimizer"])
        assert second.calibration_batches == 0
        take(second, resumed, rows[10:])
        assert same(resumed, model)
        assert (tmp_path / log.NAME).read_bytes() == whole

    def test_a_new_run_begins_a_new_log(self, tmp_path: Path) -> None:
        for _ in range(2):
            model = small()
            take(made(model, directory=tmp_path), model, batches(3))
        assert len(log.read(tmp_path)[1]) == 3

    def test_a_log_that_was_lost_is_said_to_be(self, tmp_path: Path) -> None:
        model, rows = small(), batches(6)
        first = made(model, directory=tmp_path)
        take(first, model, rows[:3])
        (tmp_path / log.NAME).unlink()
        second = made(model, directory=tmp_path)
        second.load_state_dict(first.state_dict())
        take(second, model, rows[3:])
        with pytest.raises(RunError, match="begins at step 3"):
            replay(small(), tmp_path)

    def test_what_is_no_log_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="cannot be read"):
            replay(small(), tmp_path)
        (tmp_path / log.NAME).write_bytes(b"\x00\xff\n")
        with pytest.raises(RunError, match="cannot be read"):
            replay(small(), tmp_path)
        model = small()
        (tmp_path / log.NAME).unlink()
        take(made(model, directory=tmp_path), model, batches(3))
        with pytest.raises(RunError, match="has 3 steps and not 4"):
            replay(small(), tmp_path, 4)
        with pytest.raises(RunError, match="has no weight"):
            replay(Quadratic(), tmp_path)


def squares(model: torch.nn.Module, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the sum over batches of the squared gradients, in the order of the groups."""
    weights = [weight for group in grouped(model) for weight in group["params"]]
    total = [torch.zeros(weight.numel()) for weight in weights]
    for tokens in rows:
        for each, gradient in zip(total, torch.autograd.grad(loss_of(model, tokens)(), weights), strict=True):
            each += gradient.float().flatten() ** 2
    return total


class TestSparse:
    def test_all_of_them_are_mezo(self) -> None:
        for dtype in _DTYPES:
            model, other, rows = small(dtype), small(dtype), batches(20)
            take(made(model), model, rows)
            take(made(other, "sparse_mezo", density=1.0), other, rows)
            assert same(model, other)

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    @pytest.mark.parametrize("scope", ["global", "tensor"])
    def test_the_chosen_are_those_of_the_largest_squares(self, scope: str, dtype: torch.dtype) -> None:
        model, rows, density = small(dtype), batches(3), 0.1
        optimizer = made(model, "sparse_mezo", density=density, scope=scope, calibration_batches=3)
        optimizer.calibrate(lambda: (loss_of(model, tokens)() for tokens in rows))
        found = squares(model, rows)
        if scope == "global":
            least = torch.cat(found).sort(descending=True).values[round(density * sum(map(len, found))) - 1]
            wanted = [(each >= least).nonzero().flatten() for each in found]
        else:
            wanted = [each.topk(max(1, round(density * len(each)))).indices.sort().values for each in found]
        chosen = optimizer.state_dict()["zeroth_order"]["chosen"]
        assert all(places.dtype == torch.int32 for places in chosen)
        for got, expected in zip(chosen, wanted, strict=True):
            assert torch.equal(got.long(), expected)
        assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    def test_only_the_chosen_move(self, dtype: torch.dtype) -> None:
        model, rows = small(dtype), batches(20)
        optimizer = made(model, "sparse_mezo", density=0.2, rate=0.1)
        optimizer.calibrate(lambda: (loss_of(model, tokens)() for tokens in rows[:2]))
        before = [weight.detach().clone().flatten() for group in grouped(model) for weight in group["params"]]
        take(optimizer, model, rows)
        after = [weight.detach().flatten() for group in grouped(model) for weight in group["params"]]
        moved = 0
        for old, new, places in zip(before, after, optimizer.state_dict()["zeroth_order"]["chosen"], strict=True):
            still = torch.ones(len(old), dtype=torch.bool)
            still[places.long()] = False
            assert torch.equal(old[still], new[still])
            moved += int((old != new).sum())
        assert moved > 0.8 * 0.2 * sum(map(len, before))

    def test_the_loss_falls(self) -> None:
        model, tokens = small(), batches(1)[0]
        optimizer = made(model, "sparse_mezo", density=0.2, rate=0.1)
        optimizer.calibrate(lambda: iter([loss_of(model, tokens)()]))
        losses = take(optimizer, model, [tokens] * 300)
        assert sum(losses[-10:]) < 0.9 * sum(losses[:10])

    def test_choosing_holds_two_tensors_at_most(self) -> None:
        """Bytes of storages that live at once beyond those of a forward and backward pass without any gradient kept."""
        from ftune.zeroth.calibration import most_sensitive

        model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(4)])
        weights = list(model.parameters())
        inputs = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))

        def losses() -> Iterator[torch.Tensor]:
            for _ in range(3):
                yield model(inputs).square().mean()

        with Storages() as held:
            chosen = most_sensitive(weights, losses, density=0.001, scope="global")
        largest = 4 * 1024 * 1024
        masks = 24 * 2 * sum(map(len, chosen))
        activations = 15 * 4 * inputs.numel()
        compared_at_once = 32 * (1 << 16)
        assert held.peak <= 2 * largest + masks + activations + compared_at_once
        assert held.peak > largest

    def test_a_step_before_choosing_is_refused(self) -> None:
        model = small()
        with pytest.raises(RuntimeError, match="calibrate"):
            made(model, "sparse_mezo").learn(loss_of(model, batches(1)[0]))


def test_forward_passes_hold_one_module_s_weights_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight matrices never two are there twice; slices made small, since their size does not grow with the model."""
    monkeypatch.setattr("ftune.zeroth.points._SLICE", 1 << 12)
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256, bias=False) for _ in range(8)]).eval()
    inputs = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    optimizer = made(model)
    with Storages() as held:
        optimizer.learn(lambda: model(inputs).square().mean())
        optimizer.step()
    one, slices, activations = 4 * 256 * 256, 6 * 4 * (1 << 12), 10 * 4 * inputs.numel()
    assert one <= held.peak <= one + slices + activations


class Storages(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of storages made while it is on, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        from torch.utils._pytree import tree_leaves

        old = {
            value.untyped_storage().data_ptr()
            for value in tree_leaves((args, kwargs))
            if isinstance(value, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in old and storage.data_ptr() not in self._seen:
                    size, place = storage.nbytes(), storage.data_ptr()
                    self._seen[place] = weakref.finalize(storage, self._gone, place, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return result

    def _gone(self, place: int, size: int) -> None:
        self._seen.pop(place, None)
        self.now -= size


class TestModels:
    def test_a_transformer_with_shared_embeddings(self) -> None:
        model = make_model(tie_word_embeddings=True).eval()
        tokens = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(1))
        before = bits(model)
        optimizer = made(model, rate=1e-3)
        optimizer.learn(lambda: model(input_ids=tokens, labels=tokens).loss)
        assert same(before, model)
        optimizer.step()
        assert not any(torch.equal(before[name], after) for name, after in bits(model).items())

    @pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe", "mamba"])
    def test_architectures_see_the_points_to_the_last_bit(self, kind: str) -> None:
        """Shared embeddings, experts in one tensor, a convolution read by the layer around it: against whole copies."""
        from transformers import AutoConfig, AutoModelForCausalLM

        shapes: dict[str, dict[str, Any]] = {
            "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
            "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
            "qwen3_moe": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "moe_intermediate_size": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
            },
        }
        ends = {"bos_token_id": 0, "eos_token_id": 1}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, vocab_size=100, **ends, **shapes[kind])
            model = AutoModelForCausalLM.from_config(config).eval()
        tokens = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(1))

        def loss() -> torch.Tensor:
            with torch.no_grad():
                return model(input_ids=tokens, labels=tokens, use_cache=False).loss

        optimizer = made(model)
        optimizer.learn(loss)
        ordered = [weight for group in optimizer.param_groups for weight in group["params"]]
        found, points = [], Points("stochastic")
        for distance in (1e-3, -1e-3):
            start = [weight.data for weight in ordered]
            for number, weight in enumerate(ordered):
                parts = points.at(weight.data, None, seed=step_seed(7, 0), number=number, distance=distance)
                weight.data = torch.cat([values for _, values in parts]).view_as(weight)
            found.append(loss().double().item())
            for weight, old in zip(ordered, start, strict=True):
                weight.data = old
        assert optimizer.grad_norm == abs((found[0] - found[1]) / 2e-3) > 0

    @pytest.mark.parametrize("dora", [False, True])
    def test_adapters(self, dora: bool) -> None:
        found = plugin.tuning("lora")
        options = found.Options(r=4, use_dora=dora, modules_to_save=["lm_head"])
        with torch.random.fork_rng():
            model = found.apply(make_model(), options, batches=no_rows).eval()
        base = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
        tokens = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(1))
        optimizer = made(model, rate=1e-3, eps=1e-2)
        before = bits(model)
        optimizer.learn(lambda: model(input_ids=tokens, labels=tokens).loss)
        assert same(before, model)
        optimizer.step()
        after = bits(model)
        for name, weight in model.named_parameters():
            assert weight.requires_grad != torch.equal(before[name], after[name]), name
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in base.items())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 16)


class TestRuns:
    """Whole runs through `ftune.train`."""

    SETTINGS: dict[str, Any] = {"optim": "mezo", "learning_rate": 1e-4, "weight_decay": 0.1, "max_steps": 6}

    @pytest.mark.parametrize(
        ("tuning", "dtype"),
        [("full", "bfloat16"), ("lora", "float32"), ("qlora", "float32"), ("lora_and_full", "float32")],
    )
    def test_resumed_and_rebuilt_to_the_same_bits(
        self, tuning: str, dtype: str, tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = {**self.SETTINGS, "save_strategy": "steps", "save_steps": 3}
        values = recipe(
            tiny_model,
            rows,
            tmp_path / "run",
            model={"dtype": dtype},
            tuning={"method": tuning},
            training=settings,
        )
        run = ftune.train(values)
        state = torch.load(Path(run.directory) / "checkpoints" / "checkpoint-3" / "optimizer.pt", weights_only=True)
        assert state["zeroth_order"] == {"steps": 3, "skipped": 0}
        halted = shutil.copytree(run.directory, tmp_path / "copy")
        shutil.rmtree(halted / "model")
        shutil.rmtree(halted / "checkpoints" / "checkpoint-6")
        (halted / "result.json").unlink()
        continued = resuming.reopen(halted, (), probe())
        train(continued.spec, plain=True, checkpoint=continued.checkpoint)
        assert same_bits(weights(halted), weights(run.directory))
        assert losses_of_run(halted) == losses_of_run(run.directory)
        assert (halted / log.NAME).read_bytes() == (tmp_path / "run" / log.NAME).read_bytes()
        rebuild(Path(run.directory), tmp_path / "again", None)
        assert "after step 6" in capsys.readouterr().out
        (tmp_path / "again").rename(tmp_path / "model")
        rebuilt = weights(tmp_path)
        assert same_bits(rebuilt, weights(run.directory))
        assert len(rebuilt) > 10

    def test_two_ranks_and_accumulation_equal_one_batch(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        one = {**self.SETTINGS, "max_steps": 4, "per_device_train_batch_size": 8}
        alone = ftune.train(recipe(tiny_model, rows, tmp_path / "one", training=one))
        four = {**one, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        parts = ftune.train(recipe(tiny_model, rows, tmp_path / "parts", training=four))
        two = {**one, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        path = tmp_path / "two.json"
        path.write_text(json.dumps(recipe(tiny_model, rows, tmp_path / "two", training=two)))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        done = subprocess.run(
            [*launcher, "--no-python", sys.executable, "-m", "ftune", "train", str(path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        base = weights_of(tiny_model)
        for other in (Path(parts.directory), tmp_path / "two"):
            assert losses_of_run(other) == pytest.approx(losses_of_run(alone.directory), rel=1e-6)
            for name, weight in weights(alone.directory).items():
                torch.testing.assert_close(weights(other)[name], weight, rtol=1e-6, atol=1e-6)
        assert not same_bits(base, weights(alone.directory))
        assert len(log.read(tmp_path / "two")[1]) == 4


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
