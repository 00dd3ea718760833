"""From a recipe and the name of a GPU to a plan: what `ftune plan` and `ftune.plan` do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftune.errors import Problem, RecipeError
from ftune.machine import Gpu, Machine, probe
from ftune.memory.auto_rows import choose_rows
from ftune.memory.catalogue import folder_of
from ftune.memory.events import Trace
from ftune.memory.gpus import GpuFacts, find_gpu, of_this_machine
from ftune.memory.micro_batches import of_many_passes
from ftune.memory.plan import MemoryPlan, planned
from ftune.memory.traced import trace
from ftune.memory.tracer import kept_tracer
from ftune.places import PACKAGE, expanded, stored_folder
from ftune.recipe import Loaded
from ftune.recipe.schema import Model
from ftune.resolve import Decision, RunSpec, examine, raise_errors, resolve, with_training

_MODERN = (8, 0)
"""Capability assumed of a GPU of which only the size is known: Ampere, the first with bfloat16."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan, and what it is of."""

    spec: RunSpec
    problems: tuple[Problem, ...]
    """What is odd about the recipe; no errors."""
    plan: MemoryPlan
    decisions: tuple[Decision, ...] = ()
    """What the recipe leaves to the plan."""
    trace: Trace | None = None
    """Of all layers, where it was asked for."""

    def as_json(self) -> dict[str, Any]:
        """Return the answer of `plan --json`."""
        return {**self.plan.as_json(), "decisions": [dataclasses.asdict(decision) for decision in self.decisions]}


def ask(
    recipe: str | Path | Mapping[str, Any],
    changes: Sequence[str] = (),
    *,
    gpu: str | None = None,
    timeout_seconds: float | None = None,
    whole: bool = False,
    ranks: int = 1,
) -> Planned:
    """Return the plan of a recipe on a GPU by name or size; else on this machine's, or on its processor.

    Of several `ranks` it is the plan of each one's device. Neither weights nor data need be there, and no trace takes
    longer than it may. A `whole` plan is told from all layers, and keeps the trace. Raises RecipeError and
    MachineError, and RunError for what cannot be traced.
    """
    machine, facts = machine_with(gpu)
    loaded, problems = plannable(recipe, changes, machine)
    spec = resolve(loaded, machine, fingerprints=False)
    config, decisions = config_of_model(spec.recipe.model), ()
    plans: dict[str, MemoryPlan] = {}

    def plan(one: RunSpec) -> MemoryPlan:
        key = repr(one.recipe.as_dict())
        if key not in plans:
            plans[key] = plan_of(one, config, facts, machine, ranks=ranks)
        return plans[key]

    with kept_tracer(timeout_seconds):
        if spec.recipe.training.per_device_train_batch_size == "auto":
            decisions = choose_rows(spec, plan, config, facts, machine)
            spec = with_training(spec, **{one.key.partition(".")[2]: one.value for one in decisions})
        step = step_of(spec, config, ranks=ranks) if whole else None
        found = plan(spec) if step is None else plan_of(spec, config, facts, machine, whole=step, ranks=ranks)
        return Planned(spec, tuple(problems), found, decisions, step)


def plannable(
    recipe: str | Path | Mapping[str, Any], changes: Sequence[str], machine: Machine
) -> tuple[Loaded, list[Problem]]:
    """Return a recipe that could be trained if its rows were here, and what is odd about it."""
    loaded, problems = examine(recipe, changes, machine, trains=False)
    # The rows need not be here: a plan is of the longest that the recipe allows.
    problems = [problem for problem in problems if not problem.rule.startswith("data-")]
    raise_errors(problems)
    assert loaded is not None
    return loaded, problems


def plan_of(
    spec: RunSpec,
    config: Mapping[str, Any],
    gpu: GpuFacts | None,
    machine: Machine,
    *,
    lengths: Sequence[int] = (),
    evaluated: Sequence[int] = (),
    learned: int | None = None,
    whole: Trace | None = None,
    ranks: int = 1,
) -> MemoryPlan:
    """Return the plan of a decided run; of the rows that `trace` is told, or of the largest that the recipe allows.

    With several `ranks` it is that of each one's device. Raises RecipeError for what is not planned.
    """
    if spec.recipe.distributed.offload_optimizer != "none":
        fix = "set offload_optimizer: none for the plan of a device that holds the state, too"
        raise RecipeError(Problem("plan-offload", "what an optimizer keeps on the host is not planned yet", fix=fix))

    def trace_of(layers: int | None) -> Trace:
        return step_of(spec, config, lengths=lengths, evaluated=evaluated, learned=learned, layers=layers, ranks=ranks)

    with kept_tracer():
        return planned(spec, config, gpu, trace_of, host_memory_bytes=machine.memory_bytes, whole=whole, devices=ranks)


def step_of(
    spec: RunSpec,
    config: Mapping[str, Any],
    *,
    lengths: Sequence[int] = (),
    evaluated: Sequence[int] = (),
    learned: int | None = None,
    layers: int | None = None,
    ranks: int = 1,
) -> Trace:
    """Return the trace of a run's step, with so many layers or with all; of many passes a few are followed."""

    def taken(few: RunSpec) -> Trace:
        return trace(
            few,
            config,
            device=few.device_type,
            lengths=lengths,
            evaluated=evaluated,
            learned=learned,
            layers=layers,
            ranks=ranks,
        )

    return of_many_passes(spec, taken)


def machine_with(gpu: str | None) -> tuple[Machine, GpuFacts | None]:
    """Return the machine that a run is planned for, and what is known of its GPU."""
    machine = probe()
    if gpu is None:
        return machine, of_this_machine(machine.gpus[0]) if machine.gpus else None
    facts = find_gpu(gpu)
    capability = facts.capability if facts.has_speed else _MODERN
    # A plan for another machine does not mind that PyTorch was installed for a processor here.
    packages = {name: version.partition("+")[0] for name, version in machine.packages.items()}
    there = dataclasses.replace(
        machine, gpus=(Gpu(facts.name, facts.memory_bytes, capability),), packages=packages, unknown_device=""
    )
    return there, facts


def config_of_model(model: Model) -> dict[str, Any]:
    """Return the model's configuration: of its folder, of its GGUF, of the hub's cache, or of ftune's catalogue.

    Raises RecipeError where there is none, or where the architecture is not one of transformers'.
    """
    config = _config(model)
    _require_known(model.model_name_or_path, config)
    return config


def _config(model: Model) -> dict[str, Any]:
    from ftune.models.source import config_of, raw_directory

    name = model.model_name_or_path
    if name.startswith(PACKAGE) or expanded(name).exists():
        folder = Path(raw_directory(model))
        return _of_gguf(folder, model.gguf_file) if model.gguf_file is not None else config_of(folder, name)
    cached = stored_folder(name, Path(), revision=model.revision)
    if cached is not None and (cached / "config.json").is_file():
        return config_of(cached, name)
    return config_of(folder_of(name), name)


def _of_gguf(folder: Path, name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    from ftune.models import gguf
    from ftune.models.quiet import quiet

    path = gguf.find(folder, name)
    with quiet():
        values = AutoConfig.from_pretrained(str(folder), gguf_file=path.name).to_dict()
    return {key: value for key, value in values.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _require_known(name: str, config: Mapping[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = config.get("model_type")
    if kind in CONFIG_MAPPING_NAMES:
        return
    if "auto_map" in config:
        what = f"`{name}` brings its own code, and a plan runs none"
        fix = "train a few steps of it (training.max_steps: 2), and read peak_memory_bytes in result.json"
        raise RecipeError(Problem("plan-remote-code", what, why=f"transformers has no model of type {kind!r}", fix=fix))
    what = f"`{name}` is of no architecture that transformers has" if kind else f"`{name}` does not say its model_type"
    why = f"its config.json says model_type: {kind}" if kind else "its config.json holds none"
    raise RecipeError(Problem("plan-architecture", what, why=why, fix="look at model_type in its config.json"))
