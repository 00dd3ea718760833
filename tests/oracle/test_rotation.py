"""Training in turn against plain loops: block-coordinate descent by hand, AdamW alone on each unit, float32 masters."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_runs import losses, metrics, no_rows, recipe, rows_file, same_bits, weights
from transformers import TrainingArguments, get_scheduler

import ftune
from ftune import plugin
from ftune.errors import RecipeError
from ftune.machine import probe
from ftune.rotation.optimizer import RotatingOptimizer, parts_of
from ftune.rotation.plans import Turns
from ftune.rotation.units import Unit
from ftune.training import resuming, run
from ftune.training.trainer import FtuneTrainer

ROOT = Path(__file__).parents[2]
_RATE, _DECAY = 1e-2, 0.1
_KEPT = [("adamw_torch", {}), ("adamw_torch_fused", {}), ("sgd", {"momentum": 0.9}), ("adafactor", {})]
_KEPT += [("adamw_8bit", {"min_8bit_size": 256})]
_METHODS: list[tuple[str, dict[str, Any]]] = [
    ("hift", {"order": "random"}),
    ("lisa", {"activated_layers": 1, "interval": 4}),
    ("badam", {"interval": 4, "include_head": True}),
]
_PAIRS = [(*_METHODS[0], *optimizer) for optimizer in _KEPT]
_PAIRS += [(*_METHODS[1], *_KEPT[0]), (*_METHODS[1], *_KEPT[4]), (*_METHODS[2], *_KEPT[0]), (*_METHODS[2], *_KEPT[3])]
_PAIRED = pytest.mark.parametrize(
    ("method", "options", "name", "settings"), _PAIRS, ids=[f"{pair[0]}-{pair[2]}" for pair in _PAIRS]
)
_BLOCKS = ["model.embed_tokens", "model.layers.0.", "model.layers.1.", ("model.norm", "lm_head")]
"""Beginnings of the names of each unit's weights, from the bottom up."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over the same numbers in the same order, whoever asks for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def groups_of(model: Any) -> list[dict[str, Any]]:
    """Return parameter groups as the trainer makes them: vectors are not decayed."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    decayed = [weight for weight in trained if weight.ndim > 1]
    return [
        {"params": decayed, "weight_decay": _DECAY},
        {"params": [weight for weight in trained if weight.ndim == 1], "weight_decay": 0.0},
    ]


def builder(name: str, **options: Any) -> Callable[[list[dict[str, Any]]], Any]:
    found = plugin.optimizer(name)
    chosen = found.Options(**options)
    return lambda groups: found.build(groups, learning_rate=_RATE, options=chosen, setting=plugin.Setting())


def rotating(model: Any, method: str, build: Any = None, *, seed: int = 0, **options: Any) -> RotatingOptimizer:
    found = plugin.tuning(method)
    chosen = found.Options(**options)
    found.apply(model, chosen, batches=no_rows)
    make = build or builder("adamw_torch")
    return found.rotating(model, groups_of(model), make, chosen, seed=seed, steps_per_epoch=100)  # type: ignore[return-value]


def loss_at(model: Any, step: int) -> torch.Tensor:
    """Return the loss of the step's own batch."""
    ids = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


def learn(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        loss_at(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def moved(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    """Return the names of the weights that are no longer what they were."""
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def free(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def block(model: Any, number: int) -> list[torch.nn.Parameter]:
    return [weight for name, weight in model.named_parameters() if name.startswith(_BLOCKS[number])]


class TestHiFT:
    @pytest.mark.parametrize("tied", [False, True])
    def test_one_group_is_adamw(self, tied: bool) -> None:
        plain, turned = (make_model(tie_word_embeddings=tied) for _ in range(2))
        learn(plain, torch.optim.AdamW(groups_of(plain), lr=_RATE), range(8))
        optimizer = rotating(turned, "hift", group_size=99)
        learn(turned, optimizer, range(8))
        assert optimizer.steps_per_rate == 1
        assert same_bits(state_of(plain), state_of(turned))

    @pytest.mark.parametrize(("order", "numbers"), [("bottom2up", [0, 1, 2, 3]), ("top2down", [3, 2, 1, 0])])
    def test_sgd_is_block_coordinate_descent(self, order: str, numbers: list[int]) -> None:
        """x_i <- x_i - rate * dL/dx_i at the point that the blocks before it left, on one batch."""
        plain, turned = make_model(), make_model()
        for number in numbers * 3:
            block_weights = block(plain, number)
            gradients = torch.autograd.grad(loss_at(plain, 0), block_weights)
            for weight, gradient in zip(block_weights, gradients, strict=True):
                decay = _DECAY if weight.ndim > 1 else 0.0
                weight.data.mul_(1 - _RATE * decay).add_(gradient, alpha=-_RATE)
        optimizer = rotating(turned, "hift", builder("sgd"), order=order)
        for _ in range(12):
            learn(turned, optimizer, range(1))
        assert same_bits(state_of(plain), state_of(turned))

    @pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused"])
    def test_each_unit_is_an_adamw_of_its_own(self, name: str) -> None:
        """Moments and bias correction count the unit's own updates, not the run's steps."""
        model, alone, sweeps = make_model(), make_model(), 5
        optimizer = rotating(model, "hift", builder(name))
        single = [
            torch.optim.AdamW(
                [
                    {"params": [w for w in block(alone, number) if w.ndim > 1], "weight_decay": _DECAY},
                    {"params": [w for w in block(alone, number) if w.ndim == 1], "weight_decay": 0.0},
                ],
                lr=_RATE,
            )
            for number in range(4)
        ]
        for step in range(4 * sweeps):
            loss_at(model, step).backward()
            for weight, recorded in zip(alone.parameters(), model.parameters(), strict=True):
                weight.grad = None if recorded.grad is None else recorded.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            single[step % 4].step()
        pairs = dict(zip(model.parameters(), alone.parameters(), strict=True))
        for number, part in enumerate(optimizer.parts):
            assert part.optimizer is not None
            assert len(part.optimizer.state) == len(block(model, number))
            for weight, state in part.optimizer.state.items():
                expected = single[number].state[pairs[weight]]
                assert state["step"] == expected["step"] == sweeps
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert (state[moment] - expected[moment]).abs().max() <= 1e-7
                assert (weight - pairs[weight]).abs().max() <= (0 if name == "adamw_torch" else 1e-6)

    def test_a_partial_last_group_is_a_group(self) -> None:
        model = make_model()
        optimizer = rotating(model, "hift", group_size=3)
        assert optimizer.steps_per_rate == 2
        last = {name for name in state_of(model) if name.startswith(_BLOCKS[3])}
        for step in range(6):
            before = state_of(model)
            learn(model, optimizer, range(step, step + 1))
            expected = last if step % 2 else set(before) - last
            assert moved(before, model) == expected
        steps = {part.name: {int(state["step"]) for state in part.optimizer.state.values()} for part in optimizer.parts}
        assert steps == {name: {3} for name in ("embedding", "layer 0", "layer 1", "head")}

    def test_random_order_is_drawn_once_by_the_seed(self) -> None:
        def order(seed: int, disturb: int) -> list[str]:
            random.seed(disturb)
            torch.manual_seed(disturb)
            model = make_model(num_hidden_layers=6)
            optimizer = rotating(model, "hift", builder("sgd"), seed=seed, order="random")
            seen = []
            for step in range(16):
                seen += [part.name for part in optimizer.active]
                learn(model, optimizer, range(step, step + 1))
            return seen

        first = order(1, 0)
        assert first[:8] == first[8:]
        assert len(set(first)) == 8
        assert first == order(1, 99)
        assert first != order(2, 0)
        assert first[:8] != [part.name for part in rotating(make_model(num_hidden_layers=6), "hift").parts]

    def test_only_the_moving_groups_gradients_are_made(self) -> None:
        """Bytes counted: gradients of one group, optimizer state of the groups that moved."""
        model = make_model()
        optimizer = rotating(model, "hift")
        elements = [sum(weight.numel() for weight in block(model, number)) for number in range(4)]
        for step in range(8):
            loss_at(model, step).backward()
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            assert sum(gradient.nbytes for gradient in gradients) == 4 * elements[step % 4]
            optimizer.step()
            assert all(weight.grad is None for weight in model.parameters())
            own = [tensor for tensor in optimizer.parts[step % 4].state_tensors() if tensor.numel() > 1]
            assert sum(tensor.nbytes for tensor in own) == 8 * elements[step % 4]

    def test_masters_follow_a_float32_loop(self) -> None:
        """Mixed "Hi": bfloat16 weights are float32 copies rounded to nearest, all along."""
        model, reference = make_model().bfloat16(), make_model().bfloat16()
        optimizer = rotating(model, "hift", mixed=True)
        masters = {name: torch.nn.Parameter(w.detach().float()) for name, w in reference.named_parameters()}
        loops = []
        for start in _BLOCKS:
            own = [master for name, master in masters.items() if name.startswith(start)]
            groups = [{"params": [m for m in own if m.ndim > 1], "weight_decay": _DECAY}]
            groups += [{"params": [m for m in own if m.ndim == 1], "weight_decay": 0.0}]
            loops.append(torch.optim.AdamW(groups, lr=_RATE))
        for step in range(16):
            learn(model, optimizer, range(step, step + 1))
            loss_at(reference, step).backward()
            for name, weight in reference.named_parameters():
                masters[name].grad = weight.grad.float() if name.startswith(_BLOCKS[step % 4]) else None
                weight.grad = None
            loops[step % 4].step()
            for name, weight in reference.named_parameters():
                weight.data.copy_(masters[name].data.bfloat16())
            assert same_bits(state_of(model), state_of(reference))
        held = {id(weight): master for part in optimizer.parts for weight, master in part.masters.pairs}
        assert all(torch.equal(held[id(weight)], masters[name]) for name, weight in model.named_parameters())

    def test_masters_keep_what_bfloat16_loses(self) -> None:
        """Constant small gradients move a weight with a master by their sum, and one without it not at all."""
        for mixed, expected in ((False, 1.0), (True, 1 - 64 * 1e-3)):
            model = make_model().bfloat16()
            optimizer = rotating(
                model, "hift", lambda groups: torch.optim.SGD(groups, lr=1e-3), mixed=mixed, group_size=9
            )
            norm = model.model.norm.weight
            for _ in range(64):
                norm.grad = torch.ones_like(norm)
                optimizer.step()
            assert float(norm.detach().float().mean()) == pytest.approx(expected, abs=4e-3)


class TestLISA:
    def test_all_layers_is_adamw(self) -> None:
        plain, turned = make_model(), make_model()
        learn(plain, torch.optim.AdamW(groups_of(plain), lr=_RATE), range(9))
        learn(turned, rotating(turned, "lisa", activated_layers=2, interval=3), range(9))
        assert same_bits(state_of(plain), state_of(turned))

    def test_frozen_layers_keep_their_bits_inside_an_interval(self) -> None:
        model = make_model(num_hidden_layers=6)
        optimizer = rotating(model, "lisa", activated_layers=2, interval=3)
        ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        sets = []
        for start in range(0, 36, 3):
            before, chosen = state_of(model), free(model)
            assert ends <= chosen
            sets.append({name.split(".")[2] for name in chosen - ends})
            assert len(sets[-1]) == 2
            for step in range(start, start + 3):
                assert free(model) == chosen
                learn(model, optimizer, range(step, step + 1))
                assert moved(before, model) == chosen
        assert set.union(*sets) == set("012345")
        assert len({frozenset(one) for one in sets}) > 3

    def test_state_of_layers_that_freeze_is_dropped(self) -> None:
        model = make_model(num_hidden_layers=6)
        optimizer = rotating(model, "lisa", activated_layers=1, interval=2)
        layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
        ends = sum(weight.numel() for weight in model.parameters()) - 6 * layer
        previous = None
        for step in range(24):
            (active,) = [part for part in optimizer.active if part.name.startswith("layer")]
            fresh = active is not previous and step % 2 == 0
            learn(model, optimizer, range(step, step + 1))
            if step % 2 == 0:
                held = [tensor for part in optimizer.parts for tensor in part.state_tensors() if tensor.numel() > 1]
                assert sum(tensor.nbytes for tensor in held) == 8 * (ends + layer)
                if fresh:
                    assert {int(state["step"]) for state in active.optimizer.state.values()} == {1}
            previous = active

    def test_chance_is_its_own(self) -> None:
        """Whatever a rank draws for dropout, all ranks choose the same layers; another seed, others."""

        def drawn(seed: int, disturb: int) -> list[set[str]]:
            model = make_model(num_hidden_layers=6)
            optimizer = rotating(model, "lisa", builder("sgd"), seed=seed, activated_layers=2, interval=1)
            found = []
            for step in range(8):
                random.seed(disturb + step)
                torch.manual_seed(disturb + step)
                found.append({part.name for part in optimizer.active})
                learn(model, optimizer, range(step, step + 1))
            return found

        assert drawn(1, 0) == drawn(1, 50)
        assert drawn(1, 0) != drawn(2, 0)

    def test_more_layers_than_there_are(self) -> None:
        with pytest.raises(RecipeError, match="this model has 2 layers"):
            rotating(make_model(), "lisa", activated_layers=3)


class TestBAdam:
    def test_one_block_of_everything_is_adamw(self) -> None:
        plain, turned = make_model(), make_model()
        learn(plain, torch.optim.AdamW(groups_of(plain), lr=_RATE), range(9))
        whole = Unit("everything", tuple(turned.parameters()))
        parts = parts_of([whole], groups_of(turned), builder("adamw_torch"), with_masters=True)
        learn(turned, RotatingOptimizer(parts, Turns([(0,)], interval=3), asleep="drop"), range(9))
        assert same_bits(state_of(plain), state_of(turned))

    def test_one_layer_is_adamw_on_that_layer(self) -> None:
        plain, turned = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)
        plain.requires_grad_(False)
        plain.model.layers.requires_grad_(True)
        learn(plain, torch.optim.AdamW(groups_of(plain), lr=_RATE), range(9))
        learn(turned, rotating(turned, "badam", interval=3), range(9))
        assert same_bits(state_of(plain), state_of(turned))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_each_turn_is_a_fresh_adamw(self, dtype: torch.dtype) -> None:
        """The paper's algorithm 1: for each block m, v and the count start at zero, from the weights as they stand."""
        model, reference = make_model().to(dtype), make_model().to(dtype)
        optimizer = rotating(model, "badam", interval=3, order="ascending", include_embedding=True, include_head=True)
        for step in range(24):
            if step % 3 == 0:
                own = block(reference, step // 3 % 4)
                masters = [torch.nn.Parameter(weight.detach().float()) for weight in own]
                groups = [{"params": [m for m in masters if m.ndim > 1], "weight_decay": _DECAY}]
                groups += [{"params": [m for m in masters if m.ndim == 1], "weight_decay": 0.0}]
                fresh = torch.optim.AdamW(groups, lr=_RATE)
            learn(model, optimizer, range(step, step + 1))
            gradients = torch.autograd.grad(loss_at(reference, step), own)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient.float()
            fresh.step()
            for weight, master in zip(own, masters, strict=True):
                weight.data.copy_(master.data)
            assert same_bits(state_of(model), state_of(reference)), step

    def test_what_is_left_out_never_moves(self) -> None:
        model = make_model()
        before = state_of(model)
        optimizer = rotating(model, "badam", interval=1)
        assert [part.name for part in optimizer.parts] == ["layer 0", "layer 1"]
        learn(model, optimizer, range(6))
        layers = {name for name in before if ".layers." in name}
        assert moved(before, model) == layers

    @pytest.mark.parametrize("order", ["ascending", "descending", "random"])
    def test_every_block_has_one_turn_in_a_sweep(self, order: str) -> None:
        model = make_model(num_hidden_layers=5)
        optimizer = rotating(model, "badam", builder("sgd"), interval=2, order=order)
        seen = []
        for step in range(40):
            seen += [part.name for part in optimizer.active]
            learn(model, optimizer, range(step, step + 1))
        assert seen[::2] == seen[1::2]
        sweeps = [seen[start : start + 10 : 2] for start in range(0, 40, 10)]
        names = [f"layer {number}" for number in range(5)]
        assert all(sorted(sweep) == names for sweep in sweeps)
        assert {"ascending": sweeps[1] == names, "descending": sweeps[1] == names[::-1]}.get(order, True)
        assert (len({tuple(sweep) for sweep in sweeps}) > 1) == (order == "random")

    def test_memory_is_that_of_one_block(self) -> None:
        """The paper's 16 bytes for each weight of a block: master, two moments and, in the step, a float32 gradient."""
        model = make_model().bfloat16()
        optimizer = rotating(model, "badam", interval=2)
        layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
        for step in range(8):
            loss_at(model, step).backward()
            made = [weight.grad for weight in model.parameters() if weight.grad is not None]
            assert sum(gradient.nbytes for gradient in made) == 2 * layer
            optimizer.step()
            optimizer.zero_grad()
            if step % 2 == 0:
                held = [tensor for part in optimizer.parts for tensor in part.state_tensors() if tensor.numel() > 1]
                assert sum(tensor.nbytes for tensor in held) == 12 * layer

    def test_interval_of_the_paper(self) -> None:
        """K = min(max(n / (B D), 50), 100)."""
        interval = plugin.get(plugin.TUNINGS, "badam").rotating.__globals__["customary_interval"]
        assert [interval(steps, 32) for steps in (320, 2560, 64000)] == [50, 80, 100]


class TestResume:
    @_PAIRED
    def test_goes_on_to_the_same_bits(
        self, method: str, options: dict[str, Any], name: str, settings: dict[str, Any]
    ) -> None:
        if plugin.optimizer(name).needs:
            pytest.importorskip("bitsandbytes")
        self.check(method, options, builder(name, **settings), torch.float32, half=10 if name == "adamw_torch" else 6)

    @pytest.mark.parametrize(
        ("method", "options", "name"),
        [
            ("hift", {"mixed": True}, "adamw_torch"),
            ("hift", {}, "adafactor"),
            ("lisa", {"interval": 4, "activated_layers": 1}, "adafactor"),
            ("badam", {"interval": 4}, "adamw_torch"),
        ],
    )
    def test_of_sixteen_bits(self, method: str, options: dict[str, Any], name: str) -> None:
        """Adafactor's statistics are float32 beside bfloat16 weights; PyTorch would load them as bfloat16."""
        self.check(method, options, builder(name), torch.bfloat16, half=6)

    def check(self, method: str, options: dict[str, Any], build: Any, dtype: torch.dtype, half: int) -> None:
        whole, first, second = (make_model().to(dtype) for _ in range(3))
        learn(whole, rotating(whole, method, build, **options), range(2 * half))
        optimizer = rotating(first, method, build, **options)
        learn(first, optimizer, range(half))
        file = io.BytesIO()
        torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        second.load_state_dict(saved["model"])
        resumed = rotating(second, method, build, **options)
        resumed.load_state_dict(saved["optimizer"])
        assert free(second) == free(first)
        learn(second, resumed, range(half, 2 * half))
        assert same_bits(state_of(second), state_of(whole))
        assert not same_bits(state_of(second), state_of(first))


@pytest.mark.parametrize(("method", "options"), _METHODS, ids=[name for name, _ in _METHODS])
def test_gradient_checkpointing_changes_nothing(method: str, options: dict[str, Any]) -> None:
    """Also where all that a checkpointed layer is given is frozen."""
    plain, checkpointed = make_model(), make_model()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        model.train()
        learn(model, rotating(model, method, **options), range(8))
    assert checkpointed.model.layers[0].gradient_checkpointing
    assert same_bits(state_of(plain), state_of(checkpointed))


@pytest.mark.parametrize(("method", "options"), _METHODS, ids=[name for name, _ in _METHODS])
def test_a_step_left_out_after_an_overflow_keeps_its_turn(method: str, options: dict[str, Any]) -> None:
    """PyTorch's loss scaling: a power of two changes no bit, and an overflow takes no turn and counts no step."""
    plain, scaled = make_model(), make_model()
    learn(plain, rotating(plain, method, builder("adamw_torch_fused"), **options), range(9))
    optimizer = rotating(scaled, method, builder("adamw_torch_fused"), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in [0, 1, 2, None, 3, 4, 5, None, 6, 7, 8]:
        turn, before = optimizer.plan.state_dict(), state_of(scaled)
        scaler.scale(loss_at(scaled, step or 0) * (1.0 if step is not None else torch.inf)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step is None:
            assert optimizer.plan.state_dict() == turn
            assert moved(before, scaled) == set()
    assert same_bits(state_of(plain), state_of(scaled))


@_PAIRED
def test_a_schedule_sets_the_rate_of_every_optimizer(
    method: str, options: dict[str, Any], name: str, settings: dict[str, Any]
) -> None:
    """At rate zero nothing moves: what the schedule sets is what the parts step with, also those made later."""
    if plugin.optimizer(name).needs:
        pytest.importorskip("bitsandbytes")
    model = make_model()
    optimizer = rotating(model, method, builder(name, **settings), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 3 else 1.0)
    for step in range(12):
        before = state_of(model)
        learn(model, optimizer, range(step, step + 1))
        assert bool(moved(before, model)) == (step < 3)
        schedule.step()


class TestRuns:
    """Through `ftune.train`, on the tiny model."""

    @pytest.fixture(scope="class")
    def rows(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40)

    @pytest.mark.parametrize(("schedule", "steps"), [("linear", 18), ("cosine", 12)])
    def test_a_sweep_has_one_rate(
        self, schedule: str, steps: int, tiny_model: Path, rows: Path, tmp_path: Path
    ) -> None:
        """The rates the parts really step with are those of a schedule of as many steps as there are sweeps."""
        rates: list[float] = []

        def record(optimizer: Any, _arguments: Any, _keywords: Any) -> None:
            if isinstance(optimizer, torch.optim.AdamW):
                rates.append(optimizer.param_groups[0]["lr"])

        settings = {"max_steps": steps, "per_device_train_batch_size": 2, "lr_scheduler_type": schedule}
        settings |= {"warmup_steps": 4, "save_strategy": "steps", "save_steps": steps}
        handle = register_optimizer_step_pre_hook(record)
        try:
            ftune.train(recipe(tiny_model, rows, tmp_path / "run", tuning={"method": "hift"}, training=settings))
        finally:
            handle.remove()
        single = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        sweeps = math.ceil(steps / 4)
        plain = get_scheduler(schedule, single, num_warmup_steps=1, num_training_steps=sweeps)
        expected = []
        for _ in range(sweeps):
            expected += 4 * [single.param_groups[0]["lr"]]
            single.step()
            plain.step()
        assert rates == expected[:steps]
        assert [line["learning_rate"] for line in metrics(tmp_path / "run") if "loss" in line] == rates
        ended = torch.load(tmp_path / "run" / "checkpoints" / f"checkpoint-{steps}" / "scheduler.pt", weights_only=True)
        if steps % 4 == 0:
            assert set(ended["_last_lr"]) == {single.param_groups[0]["lr"]} == {0.0}

    @pytest.mark.parametrize(("method", "options"), _METHODS, ids=[name for name, _ in _METHODS])
    def test_accumulated_batches_equal_large_ones(
        self, method: str, options: dict[str, Any], tiny_model: Path, rows: Path, tmp_path: Path
    ) -> None:
        """Turns go by optimizer steps: four micro-batches of 2 move what one batch of 8 moves."""
        tuning = {"method": method, **options, **({} if method == "hift" else {"interval": 2})}
        found = []
        for size, times in ((2, 4), (8, 1)):
            settings = {
                "optim": "sgd",
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": times,
                "max_steps": 5,
            }
            values = recipe(tiny_model, rows, tmp_path / f"{size}", tuning=tuning, training=settings)
            found.append(weights(ftune.train(values).directory))
        for name, weight in found[0].items():
            assert (weight - found[1][name]).abs().max() <= 1e-6
        assert not same_bits(found[0], weights_at(tiny_model))

    @pytest.mark.parametrize(("method", "options"), _METHODS, ids=[name for name, _ in _METHODS])
    def test_resumed_runs_end_in_the_same_bits(
        self, method: str, options: dict[str, Any], tiny_model: Path, rows: Path, tmp_path: Path
    ) -> None:
        settings = {
            "save_strategy": "steps",
            "save_steps": 6,
            "max_steps": 12,
            "eval_strategy": "steps",
            "eval_steps": 5,
        }
        values = recipe(
            tiny_model,
            rows,
            tmp_path / "whole",
            data={"eval": 0.1},
            tuning={"method": method, **options},
            training=settings,
        )
        whole = Path(ftune.train(values).directory)
        half = shutil.copytree(whole, tmp_path / "half")
        shutil.rmtree(half / "model")
        shutil.rmtree(half / "checkpoints" / "checkpoint-12")
        (half / "result.json").unlink()
        continued = resuming.reopen(half, (), probe())
        run.train(continued.spec, plain=True, checkpoint=continued.checkpoint)
        assert same_bits(weights(half), weights(whole))
        assert losses(half) == losses(whole)
        assert set(weights(whole)) == set(weights_at(tiny_model))
        results = [json.loads((path / "result.json").read_text())["eval_loss"] for path in (half, whole)]
        assert results[0] == results[1]

    def test_state_is_read_into_the_memory_of_the_host(
        self, tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on two GPUs, of which meta takes the place: what was put there could not be read back."""
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 5}
        values = recipe(tiny_model, rows, tmp_path / "run", tuning={"method": "hift"}, training=settings)
        whole = Path(ftune.train(values).directory)
        expected = weights(whole)
        shutil.rmtree(whole / "model")
        shutil.rmtree(whole / "checkpoints" / "checkpoint-6")
        (whole / "result.json").unlink()
        load = FtuneTrainer._load_optimizer_and_scheduler

        def on_two_devices(self: FtuneTrainer, checkpoint: str | None) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(TrainingArguments, "world_size", 2)
                patch.setattr(TrainingArguments, "device", torch.device("meta"))
                load(self, checkpoint)

        monkeypatch.setattr(FtuneTrainer, "_load_optimizer_and_scheduler", on_two_devices)
        continued = resuming.reopen(whole, (), probe())
        run.train(continued.spec, plain=True, checkpoint=continued.checkpoint)
        assert same_bits(weights(whole), expected)

    @pytest.mark.slow
    @pytest.mark.parametrize(("method", "options"), _METHODS, ids=[name for name, _ in _METHODS])
    def test_two_ranks_equal_one(
        self, method: str, options: dict[str, Any], tiny_model: Path, rows: Path, tmp_path: Path
    ) -> None:
        tuning = {"method": method, **options, **({} if method == "hift" else {"interval": 2})}
        found = []
        for size in (8, 4):
            settings = {"optim": "sgd", "per_device_train_batch_size": size}
            values = recipe(tiny_model, rows, tmp_path / f"{size}", tuning=tuning, training=settings)
            path = tmp_path / f"{size}.yaml"
            path.write_text(yaml.safe_dump(values))
            launcher = [
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                "2",
                "--standalone",
                "--no-python",
                sys.executable,
            ]
            command = [sys.executable, *([] if size == 8 else launcher), "-m", "ftune", "train", str(path)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            found.append(weights(tmp_path / f"{size}"))
        assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "8"), rel=1e-6)
        for name, weight in found[0].items():
            assert (weight - found[1][name]).abs().max() <= 1e-6


def weights_at(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
