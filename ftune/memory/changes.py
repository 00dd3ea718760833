"""What can be changed of a recipe so that it fits, and what each change costs: one row for each kind of change.

Rows offer settings from facts that plugins declare; whether a recipe with them is one, the rules say. A row that gives
up something of what the recipe means is offered only where the user allows it by name.

What splits a run over several GPUs (ZeRO) or moves it to the host (offload) has no row: one GPU is planned.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ftune import plugin
from ftune.errors import Problem, RecipeError
from ftune.plugin import Gradients, Optimizer, Tuning
from ftune.recipe import Loaded
from ftune.recipe.edits import REMOVED
from ftune.recipe.schema import Recipe

Settings = Mapping[str, Any]
"""Dotted keys of a recipe and their values."""


@dataclasses.dataclass(frozen=True)
class Situation:
    """What changes are offered for."""

    loaded: Loaded
    """The recipe as written."""
    decided: Recipe
    """The same without any `auto`."""
    allowed: frozenset[str] = frozenset()

    @property
    def optimizer(self) -> Optimizer:
        return plugin.optimizer(self.decided.optimizer.method)

    @property
    def tuning(self) -> Tuning:
        return plugin.tuning(self.decided.tuning.method)

    def given(self, section: str) -> Mapping[str, Any]:
        """Return what is written in a section."""
        return self.loaded.source.data.get(section) or {}

    @property
    def trains_in_float32(self) -> bool:
        """Return whether what is trained has 32 bits, as everything beside a frozen base has."""
        return self.tuning.frozen_base or self.decided.model.dtype == "float32"


@dataclasses.dataclass(frozen=True)
class Option:
    """One change: other values of some keys."""

    row: str
    settings: Settings
    costs: str
    with_several_passes: Settings = dataclasses.field(default_factory=dict)
    """Further settings where gradients of several micro-batches are added up."""
    gives_up: int = 0
    """How many allowances it takes; 0 where the numbers stay what they were, but for rounding."""
    slower: float = 1.0
    """About how many times as long a step takes: only to order what cannot be timed."""
    never_faster: bool = False
    """Whether a step with as large micro-batches is never faster with it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of change."""

    name: str
    keys: tuple[str, ...]
    summary: str
    costs: str
    allow: str
    """Words that `--allow` takes for it; empty where it needs no allowance."""
    options: Callable[[Situation], Iterator[Option]]


def _attention(situation: Situation) -> Iterator[Option]:
    if situation.decided.model.attn_implementation == "eager":
        yield Option(
            "attention",
            {"model.attn_implementation": "sdpa"},
            "nothing: the same numbers but for rounding, without the matrix of all scores",
            slower=0.9,
        )


def _checkpointing(situation: Situation) -> Iterator[Option]:
    # A second forward beside one forward and one backward; of frozen weights no gradients are computed.
    slower = 3 / 2 if situation.tuning.frozen_base else 4 / 3
    if situation.optimizer.gradients is Gradients.NONE and not situation.optimizer.calibrates:
        return
    if situation.decided.training.gradient_checkpointing:
        costs = "memory: activations are kept, and not computed a second time"
        yield Option("checkpointing", {"training.gradient_checkpointing": False}, costs, slower=1 / slower)
    else:
        costs = "time: each layer's forward is computed again in backward; the numbers stay the same"
        settings = {"training.gradient_checkpointing": True}
        yield Option("checkpointing", settings, costs, slower=slower, never_faster=True)


def _same_optimizer(situation: Situation) -> Iterator[Option]:
    own = situation.optimizer
    for name in plugin.names(plugin.OPTIMIZERS):
        other = plugin.optimizer(name)
        known = set(situation.decided.training.optim_args) <= set(other.Options.model_fields)
        if name == own.name or not own.computes or other.computes != own.computes or not known:
            continue
        if not situation.trains_in_float32:
            continue  # states and sums of 16 bits are not rounded alike
        if other.gradients is Gradients.KEPT:
            yield Option("optimizer_form", {"training.optim": name}, "nothing: the same mathematics")
            continue
        clips = float(situation.decided.training.max_grad_norm) > 0
        costs = "no gradients are kept: each moves its weight inside backward"
        settings: dict[str, Any] = {"training.optim": name}
        if clips:
            costs += "; time: clipping by the global norm takes a second backward"
            settings["training.max_grad_norm"] = situation.decided.training.max_grad_norm
        slower = 5 / 3 if clips else 1.0
        further, said = _accumulating(other, exact=True)
        yield Option("optimizer_form", settings, costs + said, further, slower=slower, never_faster=clips)
    if own.gradients is Gradients.FUSED and not own.accumulates(situation.decided.optimizer.options):
        further, said = _accumulating(own, exact=True)
        yield Option("optimizer_form", {}, "smaller micro-batches" + said, further)


def _accumulating(optimizer: Optimizer, *, exact: bool) -> tuple[Settings, str]:
    """Return how several micro-batches become one step inside backward, and what is to be said of it."""
    if optimizer.gradients is not Gradients.FUSED or "accumulate" not in optimizer.Options.model_fields:
        return {}, ""
    settings = {"training.optim_args.accumulate": "buffer"}
    if not exact:
        return settings, "; gradients of micro-batches are added up in bfloat16, rounded by chance"
    settings["training.optim_args.buffer"] = "host"
    return settings, "; gradients of micro-batches are added up in the host's memory, 4 bytes for each weight"


def _other_optimizer(situation: Situation) -> Iterator[Option]:
    own = situation.optimizer
    for name in plugin.names(plugin.OPTIMIZERS):
        if name not in situation.allowed or name == own.name:
            continue
        other = plugin.optimizer(name)
        given = situation.given("training")
        settings: dict[str, Any] = {"training.optim": name}
        options = given.get("optim_args") or {}
        kept = {key: value for key, value in options.items() if key in other.Options.model_fields}
        if kept != options:
            settings["training.optim_args"] = kept or REMOVED
        costs = f"other numbers: {other.summary[:1].lower()}{other.summary[1:].rstrip('.')}"
        costs += _new_rate(settings, given)
        slower = 5 / 3 if other.gradients is Gradients.FUSED and other.default_max_grad_norm > 0 else 1.0
        further, said = _accumulating(other, exact=False)
        yield Option("optimizer", settings, costs + said, further, gives_up=1, slower=slower)


def _other_tuning(situation: Situation) -> Iterator[Option]:
    own = situation.tuning
    for name in plugin.names(plugin.TUNINGS):
        if name not in situation.allowed or name == own.name:
            continue
        other = plugin.tuning(name)
        kept = {key: value for key, value in situation.given("tuning").items() if key in other.Options.model_fields}
        settings: dict[str, Any] = {"tuning": {"method": name, **kept}}
        costs = f"another method: {other.summary[:1].lower()}{other.summary[1:].rstrip('.')}"
        if other.has_adapter != own.has_adapter:
            costs += _new_rate(settings, situation.given("training"))
        slower = 1.3 if other.quantises or other.takes_codes else 1.0  # codes are unpacked at each use
        yield Option("tuning", settings, costs, gives_up=1, slower=slower)


def _new_rate(settings: dict[str, Any], given: Mapping[str, Any]) -> str:
    """Put the customary learning rate in place of one that was meant for something else, and return what to say."""
    if given.get("learning_rate", "auto") == "auto":
        return ""
    settings["training.learning_rate"] = "auto"
    return f"; learning_rate {given['learning_rate']:g} was meant for another method, and becomes the customary one"


def _bfloat16(situation: Situation) -> Iterator[Option]:
    if "bfloat16" in situation.allowed and situation.decided.model.dtype == "float32":
        costs = "precision: weights have 8 bits of digits, where small updates may be lost"
        yield Option("bfloat16", {"model.dtype": "bfloat16"}, costs, gives_up=1)


_SHORTEST_ROW = 64
"""Tokens below which rows are not cut."""


def _max_length(situation: Situation) -> Iterator[Option]:
    length, times = situation.decided.data.max_length, 0
    while "max_length" in situation.allowed and length // 2 >= _SHORTEST_ROW:
        length, times = length // 2, times + 1
        costs = f"rows: what is longer than {length} tokens is cut there"
        yield Option("max_length", {"data.max_length": length}, costs, gives_up=times)


ROWS: tuple[Row, ...] = (
    Row(
        "attention",
        ("model.attn_implementation",),
        "eager attention becomes PyTorch's fused one",
        "nothing: the same numbers but for rounding",
        "",
        _attention,
    ),
    Row(
        "checkpointing",
        ("training.gradient_checkpointing",),
        "on, or off where there is room",
        "on: about a third more time, half as much again beside a frozen base; the same numbers",
        "",
        _checkpointing,
    ),
    Row(
        "optimizer_form",
        ("training.optim", "training.optim_args", "training.max_grad_norm"),
        "another form of the same optimizer: one kernel, or inside backward where no gradients are kept",
        "inside backward, clipping by the global norm takes a second backward; the same numbers but for rounding",
        "",
        _same_optimizer,
    ),
    Row(
        "optimizer",
        ("training.optim", "training.optim_args", "training.learning_rate"),
        "another optimizer",
        "other numbers: its learning rate becomes the customary one",
        "the name of an optimizer",
        _other_optimizer,
    ),
    Row(
        "bfloat16",
        ("model.dtype",),
        "weights of 16 bits",
        "precision: small updates may be lost",
        "bfloat16",
        _bfloat16,
    ),
    Row(
        "tuning",
        ("tuning", "training.learning_rate"),
        "another tuning, with the options that both have",
        "another method: other weights move, or a base in fewer bits",
        "the name of a tuning",
        _other_tuning,
    ),
    Row(
        "max_length",
        ("data.max_length",),
        f"half the length of the longest row, as often as needed, down to {_SHORTEST_ROW} tokens",
        "rows: longer ones are cut",
        "max_length",
        _max_length,
    ),
)
"""The kinds of change; the micro-batch, which trades with the number of passes, goes with every one of them."""


def same_batch(situation: Situation) -> tuple[int, ...]:
    """Return the micro-batches that add up to the recipe's batch, the largest first."""
    training = situation.decided.training
    if training.max_tokens_per_batch is not None:
        return (training.rows_at_once,)  # rows do not say how large a micro-batch is
    whole = training.rows_at_once * training.gradient_accumulation_steps
    return tuple(rows for rows in range(whole, 0, -1) if whole % rows == 0)


def batch_settings(situation: Situation, rows: int) -> Settings:
    """Return what makes micro-batches of so many rows, of the same whole."""
    training = situation.decided.training
    if rows == training.rows_at_once:
        return {}
    passes = training.rows_at_once * training.gradient_accumulation_steps // rows
    settings = {"training.per_device_train_batch_size": rows}
    if passes != training.gradient_accumulation_steps:
        settings["training.gradient_accumulation_steps"] = passes
    return settings


def check_allowed(names: Iterable[str]) -> frozenset[str]:
    """Return what is allowed, from names or lists of names with commas; raises RecipeError for what is none."""
    found = [name.strip() for given in names for name in given.split(",") if name.strip()]
    known = allowable()
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            fix = f"did you mean {' or '.join(near)}?" if near else "it takes " + ", ".join(known)
            raise RecipeError(Problem("allow-name", f"there is nothing called `{name}` to allow", fix=fix))
    return frozenset(found)


def allowable() -> tuple[str, ...]:
    """Return every word that `--allow` takes."""
    return ("bfloat16", "max_length", *plugin.names(plugin.TUNINGS), *plugin.names(plugin.OPTIMIZERS))


def combinations(situation: Situation) -> list[tuple[Option, ...]]:
    """Return every set of options, of which no two change the same keys, the empty one first."""
    found: list[tuple[Option, ...]] = [()]
    for row in ROWS:
        options = list(row.options(situation))
        more = [(*chosen, option) for chosen in found for option in options if not _clash(chosen, option)]
        found += more
    return found


def _clash(chosen: Iterable[Option], option: Option) -> bool:
    keys = option.settings.keys() | option.with_several_passes.keys()
    return any(keys & (other.settings.keys() | other.with_several_passes.keys()) - _SHARED for other in chosen)


_SHARED = {"training.learning_rate"}
"""What several rows may set, to one value."""


def settings_with(situation: Situation, options: Iterable[Option], rows: int) -> dict[str, Any]:
    """Return what a recipe says with the options, in micro-batches of so many rows."""
    training = situation.decided.training
    passes = training.rows_at_once * training.gradient_accumulation_steps // rows
    found: dict[str, Any] = {}
    for option in options:
        found |= {**option.settings, **(option.with_several_passes if passes > 1 else {})}
    return {**found, **batch_settings(situation, rows)}
