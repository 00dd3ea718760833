"""The search for a fit against trying everything, over made-up devices on which more rows take more and are faster."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from ftune.errors import RecipeError
from ftune.machine import Gpu, Machine
from ftune.memory.candidates import built
from ftune.memory.changes import Situation, check_allowed, combinations, same_batch
from ftune.memory.overhead import Need
from ftune.memory.plan import MemoryPlan
from ftune.memory.search import Candidate, Refused, Room, Search, best
from ftune.recipe import load
from ftune.recipe.schema import Recipe
from ftune.resolve import RunSpec, resolve

_PACKAGES = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"), "1")
_MACHINE = Machine(gpus=(Gpu("a GPU", 2**34, (8, 0)),), packages=_PACKAGES)


def situation(allow: str = "", **training: Any) -> Situation:
    loaded = load(
        {
            "model": {"model_name_or_path": "org/model"},
            "data": {"train": "rows.jsonl"},
            "training": {"output_dir": "runs/x", **training},
        }
    )
    return Situation(loaded, resolve(loaded, _MACHINE, fingerprints=False).recipe, check_allowed([allow]))


_BUILT: dict[str, Candidate | Refused] = {}


class Device:
    """Bytes and seconds by a formula of what a recipe says, with shares drawn by chance."""

    def __init__(self, seed: int, *, timed: bool) -> None:
        chance = random.Random(seed)
        self.timed = timed
        self.traced = 0
        self.capacity = chance.randint(50, 3000)
        self.weights = chance.randint(10, 400)
        self.row = chance.randint(1, 100)
        self.checkpointed = chance.uniform(0.1, 1.0)
        self.launch = chance.uniform(0, 2)
        self.by_name: dict[str, tuple[float, float]] = {}
        self.chance = chance

    def share(self, name: str) -> tuple[float, float]:
        """Return bytes for each weight and seconds for each row of an optimizer or a tuning."""
        if name == "adamw_fused_backward":
            # Clipping takes a second backward, so that it is never faster than what keeps its gradients.
            return self.share("adafactor")[0], 1.5 * self.share("adamw_torch")[1]
        if name not in self.by_name:
            self.by_name[name] = self.chance.uniform(0, 3), self.chance.uniform(0.5, 1.5)
        return self.by_name[name]

    def bound(self, spec: RunSpec) -> int:
        recipe = spec.recipe
        return int(self.weights * (1 + self.share(recipe.optimizer.method)[0] * self.share(recipe.tuning.method)[0]))

    def plan(self, spec: RunSpec) -> MemoryPlan:
        self.traced += 1
        training, recipe = spec.recipe.training, spec.recipe
        rows, passes = training.per_device_train_batch_size, training.gradient_accumulation_steps
        each = self.row * (self.checkpointed if training.gradient_checkpointing else 1.0)
        least = self.bound(spec) + int(rows * each)
        speed = self.share(recipe.optimizer.method)[1] * self.share(recipe.tuning.method)[1]
        seconds = passes * (self.launch + rows * speed * (4 / 3 if training.gradient_checkpointing else 1.0))
        return MemoryPlan(
            parts={"weights": least, "overhead": 0},
            phases={},
            peak_at="",
            allocated_bytes=least,
            need=Need(least, int(least * 1.2)),
            device="made up",
            capacity_bytes=self.capacity,
            host_bytes=0,
            disk_bytes=0,
            tokens_per_step=rows * passes * recipe.data.max_length,
            seconds_per_step=seconds if self.timed else None,
        )


def search_of(given: Situation, device: Device, most_plans: int | None = None) -> Search:
    def build(settings: Mapping[str, Any]) -> Candidate | Refused:
        key = f"{given} {settings}"
        if key not in _BUILT:
            _BUILT[key] = built(given.loaded, _MACHINE, settings)
        return _BUILT[key]

    room = Room(device.capacity, int(device.capacity / 1.2))
    return Search(given, build, device.plan, device.bound, room, most_plans)


def brute_force(search: Search) -> Any:
    """Return what to take after a look at everything, by the words of the documentation."""
    given = search.situation
    every = [
        tried
        for options in combinations(given)
        for rows in same_batch(given)
        if (tried := search.evaluate(options, rows)) is not None
    ]
    for comfortable in (True, False):
        fitting = [tried for tried in every if tried.fits(comfortable)]
        if fitting:
            fewest = min(sum(option.gives_up for option in tried.options) for tried in fitting)
            return best([tried for tried in fitting if sum(option.gives_up for option in tried.options) == fewest])
    return None


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize(("allow", "rows"), [("", 6), ("lora,lomo", 2)])
def test_it_takes_what_trying_everything_takes(allow: str, rows: int, timed: bool) -> None:
    given = situation(allow, per_device_train_batch_size=rows, gradient_accumulation_steps=4)
    outcomes = set()
    for seed in range(60):
        device, other = Device(seed, timed=timed), Device(seed, timed=timed)
        for name in ("full", "lora", "adamw_torch", "adamw_torch_fused", "adamw_fused_backward", "lomo"):
            device.share(name), other.share(name)
        found, expected = search_of(given, device).run(), brute_force(search_of(given, other))
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.candidate.settings == expected.candidate.settings
        assert device.traced <= other.traced
        outcomes.add(repr(found and found.candidate.settings))
    assert len(outcomes) > 5  # also what fits nowhere is among them


@pytest.mark.parametrize("most", [2, 6])
def test_with_few_plans_it_takes_what_it_has_seen(most: int) -> None:
    given = situation(per_device_train_batch_size=6, gradient_accumulation_steps=4)
    found = missed = 0
    for seed in range(60):
        device, whole = Device(seed, timed=True), Device(seed, timed=True)
        for name in ("full", "adamw_torch", "adamw_torch_fused", "adamw_fused_backward"):
            device.share(name), whole.share(name)
        few = search_of(given, device, most)
        taken, best_of_all = few.run(), search_of(given, whole).run()
        assert device.traced <= most
        if taken is not None:
            assert taken.fits(comfortable=False)
            assert best_of_all is not None
            found += 1
        # Rows that fit one at a time without any other change are seen in the first plans.
        alone = few.tried.get((repr([]), 1))
        assert taken is not None or alone is None or not alone.fits(comfortable=False)
        missed += taken is None and best_of_all is not None
    assert found > 20
    assert missed < found


def test_the_batch_and_what_is_not_allowed_stay() -> None:
    given = situation(per_device_train_batch_size=6, gradient_accumulation_steps=2, learning_rate=3e-4)
    for options in combinations(given):
        for rows in same_batch(given):
            made = built_of(given, options, rows)
            if isinstance(made, Refused):
                continue
            recipe = made.spec.recipe
            assert recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps == 12
            assert _meaning(recipe) == _meaning(given.decided)


def built_of(given: Situation, options: Any, rows: int) -> Candidate | Refused:
    from ftune.memory.changes import settings_with

    return built(given.loaded, _MACHINE, settings_with(given, options, rows))


def _meaning(recipe: Recipe) -> tuple[Any, ...]:
    from ftune import plugin

    training = recipe.training
    return (
        recipe.tuning,
        recipe.model.dtype,
        recipe.data.max_length,
        training.learning_rate,
        training.max_grad_norm,
        training.weight_decay,
        plugin.optimizer(training.optim).computes,
    )


def test_another_optimizer_takes_the_options_that_it_has_and_its_own_rate() -> None:
    given = situation("lomo", learning_rate=3e-4, optim_args={"betas": [0.9, 0.95]})
    lomo = next(options for options in combinations(given) if [option.gives_up for option in options] == [1])
    made = built_of(given, lomo, 8)
    assert isinstance(made, Candidate)
    assert made.spec.recipe.training.optim == "lomo"
    assert made.spec.recipe.training.optim_args == {}
    assert made.spec.recipe.training.learning_rate == 1e-2  # its customary one
    assert "learning_rate 0.0003 was meant for another method" in lomo[0].costs


def test_rules_drop_what_is_no_recipe_by_name() -> None:
    given = situation("hift,lomo")
    both = next(
        options for options in combinations(given) if {option.row for option in options} == {"optimizer", "tuning"}
    )
    assert built_of(given, both, 8) == Refused("turns-need-kept-gradients")


def test_forms_that_compute_the_same_have_the_same_rate_and_options() -> None:
    from ftune import plugin

    known = [plugin.optimizer(name) for name in plugin.names(plugin.OPTIMIZERS)]
    for one in known:
        for other in known:
            if one.computes and one.computes == other.computes:
                assert one.default_learning_rate == other.default_learning_rate
                shared = one.Options.model_fields.keys() & other.Options.model_fields.keys()
                assert all(
                    one.Options.model_fields[key].default == other.Options.model_fields[key].default for key in shared
                )


def test_what_cannot_be_allowed_is_told_with_what_is_near() -> None:
    with pytest.raises(RecipeError, match="did you mean qlora or"):
        check_allowed(["lomo", "qlor"])
