"""`ftune plan --fit` on real traces: what it takes, what it writes, and what it says where nothing fits."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftune.memory.ask import machine_with, plan_of, plannable
from ftune.memory.bounds import Bounds
from ftune.memory.candidates import built
from ftune.memory.changes import Situation, check_allowed, combinations, same_batch
from ftune.memory.fit import searched
from ftune.memory.micro_batches import of_many_passes
from ftune.memory.overhead import context_of, with_workspaces
from ftune.memory.peak import peak
from ftune.memory.plan import MemoryPlan
from ftune.memory.replay import replay
from ftune.memory.search import Room, Search, best
from ftune.memory.traced import trace
from ftune.memory.tracer import kept_tracer
from ftune.recipe import load, overrides, source
from ftune.resolve import RunSpec, resolve

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_RECIPE = """\
# what I train
model:
  model_name_or_path: {model}   # a small one
data: {{train: not-here.jsonl, max_length: 1024}}
training:
  output_dir: runs/x
  per_device_train_batch_size: 2   # rows
  # how often
  gradient_accumulation_steps: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fit")
    (made / "model").mkdir()
    (made / "model" / "config.json").write_text(json.dumps(_CONFIG))
    (made / "recipe.yaml").write_text(_RECIPE.format(model=made / "model"))
    return made


@pytest.fixture(scope="module")
def tracer() -> Iterator[None]:
    with kept_tracer():
        yield


class Planner:
    """Real plans, each traced once, on a GPU whose memory can be chosen."""

    def __init__(self) -> None:
        self.machine, self.facts = machine_with("4090")
        self.plans: dict[str, MemoryPlan] = {}
        self.capacity = 0
        self.asked: set[str] = set()

    def __call__(self, spec: RunSpec) -> MemoryPlan:
        key = repr(spec.recipe.as_dict())
        self.asked.add(key)
        if key not in self.plans:
            self.plans[key] = plan_of(spec, _CONFIG, self.facts, self.machine)
        return dataclasses.replace(self.plans[key], capacity_bytes=self.capacity)


@pytest.mark.slow
def test_it_takes_what_a_trace_of_every_candidate_says(folder: Path, tracer: None) -> None:
    planner, bounds = Planner(), Bounds(_CONFIG)
    loaded, _ = plannable(folder / "recipe.yaml", (), planner.machine)

    def fit(capacity: int) -> Any:
        planner.capacity, planner.asked = capacity, set()
        # No room is too small for a bound here: the bounds have a test of their own.
        return searched(loaded, planner.machine, check_allowed([]), planner, bounds, Room(capacity, capacity))

    decided = resolve(loaded, planner.machine, fingerprints=False).recipe
    situation = Situation(loaded, decided)
    planner.capacity = 2**40
    every = Search(
        situation,
        lambda settings: built(loaded, planner.machine, settings),
        planner,
        lambda spec: bounds.of(spec.recipe),
        Room(2**40, 2**40),
    )
    tried = [
        made
        for options in combinations(situation)
        for rows in same_batch(situation)
        if (made := every.evaluate(options, rows)) is not None
    ]
    assert len(tried) == 12
    for one in tried:
        assert bounds.of(one.candidate.spec.recipe) <= one.plan.live_bytes
    sizes = sorted({size for one in tried for size in (one.plan.peak_bytes, one.plan.need.high_bytes)})
    taken = set()
    for capacity in (sizes[0] - 1, *sizes):
        found = fit(capacity)
        now = [dataclasses.replace(one, plan=dataclasses.replace(one.plan, capacity_bytes=capacity)) for one in tried]
        fitting = [one for one in now if one.fits(True)] or [one for one in now if one.fits(False)]
        assert found.fits == bool(fitting)
        if fitting:
            assert found.after.candidate.settings == best(fitting).candidate.settings
            taken.add(repr(found.after.candidate.settings))
        saved = sum(change.saves_bytes for change in found.changes)
        assert saved == found.before.plan.peak_bytes - found.after.plan.peak_bytes
    assert len(taken) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"tuning": {"method": "qlora"}},
        {"tuning": {"method": "lora"}},
        {"tuning": {"method": "hift"}},
        {"training": {"optim": "adamw_8bit"}},
        {"training": {"optim": "paged_adamw_8bit"}},
        {"training": {"optim": "lomo"}, "model": {"dtype": "bfloat16"}},
    ],
    ids=str,
)
def test_bounds_are_below_what_is_traced(folder: Path, tracer: None, changes: dict[str, Any]) -> None:
    planner = Planner()
    sections = source.parse("", (folder / "recipe.yaml").read_text()).data
    sections["data"]["max_length"] = 16  # so that weights are most of what is held
    loaded = load({name: {**sections.get(name, {}), **changes.get(name, {})} for name in (*sections, *changes)})
    spec = resolve(loaded, planner.machine, fingerprints=False)
    bound, live = Bounds(_CONFIG).of(spec.recipe), planner(spec).live_bytes
    assert 0.25 * live < bound <= live


@pytest.mark.slow
def test_a_kept_tracer_traces_as_a_fresh_process_does(folder: Path) -> None:
    loaded, _ = plannable(folder / "recipe.yaml", (), Planner().machine)
    spec = resolve(loaded, Planner().machine, fingerprints=False)
    fresh = trace(spec, _CONFIG, device="cuda")
    with kept_tracer():
        assert trace(spec, _CONFIG, device="cuda") == fresh
        assert trace(spec, _CONFIG, device="cuda") == fresh


@pytest.mark.slow
def test_the_low_end_is_what_the_allocator_passes_with(folder: Path, tracer: None) -> None:
    planner = Planner()
    loaded, _ = plannable(folder / "recipe.yaml", ("training.gradient_checkpointing=true",), planner.machine)
    spec = resolve(loaded, planner.machine, fingerprints=False)
    assert planner.facts is not None
    plan, capability = planner(spec), planner.facts.capability
    events = with_workspaces(trace(spec, _CONFIG, device="cuda").events, capability)
    least = plan.need.low_bytes - context_of(capability).low_mib * 2**20
    assert replay(events, capacity_bytes=least).full_at is None
    assert replay(events, capacity_bytes=least - 2 * 2**20).full_at is not None
    assert plan.allocated_bytes < least < replay(events).peak_reserved_bytes


@pytest.mark.slow
def test_many_passes_are_told_from_few(folder: Path, tracer: None) -> None:
    planner = Planner()
    settings = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=8"]
    loaded, _ = plannable(folder / "recipe.yaml", settings, planner.machine)
    spec = resolve(loaded, planner.machine, fingerprints=False)
    whole = trace(spec, _CONFIG, device="cuda")
    asked: list[int] = []

    def few(one: RunSpec) -> Any:
        asked.append(one.recipe.training.gradient_accumulation_steps)
        return trace(one, _CONFIG, device="cuda")

    found = of_many_passes(spec, few)
    assert asked == [2, 3]
    assert found.work == whole.work
    assert peak(found) == peak(whole)


@pytest.mark.slow
def test_the_written_recipe_is_the_recipe_with_the_changes(folder: Path, ftune: Callable[..., Any]) -> None:
    recipe, written = folder / "recipe.yaml", folder / "written" / "fitting.yaml"
    given = ("--gpu", "1250MiB", "--set", "training.seed=7")
    done = ftune("plan", recipe, *given, "--fit", "--json", "--write", written)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["fits"] is True
    assert answer["changes"]
    assert {"key", "before", "after", "saves_bytes", "costs"} == answer["changes"][0].keys()
    settings = [f"{change['key']}={json.dumps(change['after'])}" for change in answer["changes"]]
    expected = overrides.apply(source.parse("", recipe.read_text()), ["training.seed=7", *settings]).data
    assert source.parse("", written.read_text()).data == expected
    before, after = recipe.read_text().splitlines(), written.read_text().splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "-+"]
    keys = ["seed", *(change["key"].rpartition(".")[2] for change in answer["changes"])]
    assert all(line[2:].split(":")[0].strip() in keys for line in changed)
    assert [line for line in before if "#" in line and line.lstrip()[0] == "#"] == [
        line for line in after if "#" in line and line.lstrip()[0] == "#"
    ]
    again = ftune("plan", recipe, *given, "--fit", "--write", written)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.slow
def test_where_nothing_fits_it_says_what_comes_nearest(folder: Path, ftune: Callable[..., Any]) -> None:
    done = ftune("plan", folder / "recipe.yaml", "--gpu", "260MiB", "--fit", "--write", folder / "none.yaml")
    assert done.returncode == 3
    assert "nothing fits; the nearest needs" in done.stdout
    assert not (folder / "none.yaml").exists()
