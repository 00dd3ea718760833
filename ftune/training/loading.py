"""What a run starts from, loaded: rows as tokens, and the base model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ftune import plugin
from ftune.cache import cache_directory
from ftune.data.collate import Collator, padding_id
from ftune.data.lengths import NOW, length_summary, padding_of
from ftune.data.prepare import LOOKED_AT, Prepared, Stored, prepare
from ftune.errors import RecipeError
from ftune.models import fingerprint
from ftune.models.load import load_model
from ftune.models.quiet import quiet
from ftune.models.source import config_of, source_directory
from ftune.recipe.schema import Recipe
from ftune.resolve import Decision, RunSpec, files
from ftune.sharding.model import held, split
from ftune.training import directory, progress
from ftune.units import format_count

_READ = ("input_ids", "attention_mask", "position_ids", "labels")
"""What a tuning sees of a batch."""
_CHEAPER = {"packing": "data.packing: true", "group_by_length": "training.group_by_length: true"}
"""Settings that leave less padding."""
_WORTH_SAYING = 0.1
"""Below it the steps saved are no reason to change a recipe."""


def load_base(spec: RunSpec, shown: progress.Progress) -> tuple[RunSpec, Any]:
    """Load the model; where ftune chose an attention that this architecture lacks, it chooses again and says so."""
    recipe = spec.recipe
    tuning = plugin.tuning(recipe.tuning.method)
    bits = tuning.quantization(recipe.tuning.options)
    folder = Path(source_directory(recipe.model, shown.say))
    held = config_of(folder, recipe.model.model_name_or_path)
    if (problem := files.quantised_base(folder, held, recipe.tuning.method)) is not None:
        raise RecipeError(problem)
    if (adapter := getattr(recipe.tuning.options, "adapter", None)) is not None:
        fingerprint.check(Path(adapter), folder, recipe.model.model_name_or_path)
    load = functools.partial(load_model, device_type=spec.device_type, say=shown.say, quantization=bits)
    try:
        return spec, load(recipe.model)
    except RecipeError as error:
        chosen = any(decision.key == "model.attn_implementation" for decision in spec.decisions)
        if not chosen or error.problems[0].rule != "attention-unsupported":
            raise
    decision = Decision("model.attn_implementation", "eager", "this architecture has no fused attention")
    shown.say(f"{decision.key} = {decision.value}: {decision.why}")
    spec = directory.settle(spec, decision)
    return spec, load(spec.recipe.model)


def collator_of(recipe: Recipe, tokenizer: Any, model: Any, data: Prepared) -> Collator:
    """Return what makes batches of rows."""
    padding = padding_id(tokenizer, model.get_input_embeddings().num_embeddings)
    flatten = recipe.model.attn_implementation.startswith("flash")
    return Collator(padding, flatten=flatten, by_source=data.has_several_sources)


def batches_to_look_at(spec: RunSpec, data: Prepared, collator: Collator, device: Any) -> plugin.Batches:
    """Return what yields batches before the first step: of rows that are all there, drawn by the seed; of a stream, the
    first."""
    training = spec.recipe.training

    def batches(count: int, *, rows: int | None = None) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            data.train,
            batch_size=rows or training.rows_at_once,
            shuffle=hasattr(data.train, "__len__"),
            generator=torch.Generator().manual_seed(training.seed),
            collate_fn=collator,
        )
        for batch in itertools.islice(loader, count):
            yield {name: batch[name].to(device) for name in _READ if name in batch}

    return batches


def load_rows(spec: RunSpec, tokenizer: object) -> Prepared:
    return prepare(
        spec.recipe.data,
        tokenizer=tokenizer,
        seed=spec.recipe.training.seed,
        cache=cache_directory() / "tokens",
        learns=plugin.objective(spec.recipe.objective.method).formats,
    )


def ready(spec: RunSpec, model: Any, data: Prepared, collator: Collator, shown: progress.Progress) -> Any:
    """Return the model as the recipe's tuning trains it: what it is trained upon made, and the rest of it frozen."""
    recipe = spec.recipe
    tuning, options = plugin.tuning(recipe.tuning.method), recipe.tuning.options
    batches = batches_to_look_at(spec, data, collator, model.device)
    home = Path(recipe.training.output_dir)
    model = tuning.prepare(model, options, directory=home, batches=batches, say=shown.say)
    with quiet():
        return tuning.apply(model, options, batches=batches)


def shared_out(spec: RunSpec, model: Any, arguments: Any, shown: progress.Progress) -> Any:
    """Return the model with its weights split over the ranks, where the recipe asks for it; say what holds it."""
    ranks = arguments.world_size
    distributed = spec.recipe.distributed
    if ranks == 1:
        if distributed.zero_stage > 0:
            shown.say("there is one process, which holds everything: nothing is split")
        return model
    if distributed.splits_weights:
        model = split(model, arguments.device.type, stage=distributed.zero_stage)
    counted = held(model)
    part = f"{format_count(counted.own)} of {format_count(counted.every)} weights"
    state = f", and of the optimizer's state one part in {ranks}" if distributed.zero_stage > 0 else ""
    shown.say(f"{distributed.engine} over {ranks} ranks: this one holds {part}{state}")
    return model


def prompts_of(spec: RunSpec, data: Prepared) -> tuple[object, ...]:
    asked = spec.recipe.training.sample_prompts
    return data.prompts if asked is None else tuple(asked)


def tell(data: Prepared, recipe: Recipe, shown: progress.Progress) -> None:
    """Say what the rows are, what is odd about them, and how much of a batch they leave to padding."""
    for name, sources in data.stored.items():
        for each in sources:
            counts, which = each.audit, f" {each.part.source}" if len(sources) > 1 else ""
            shown.say(
                f"{name}{which}: {counts.rows:,} {each.encoding.format.name} rows, {counts.tokens:,} tokens, "
                f"{counts.supervised_tokens:,} of them learned; a row has {_lengths(each)}"
            )
    if "train" in data.stored:
        shown.say(f"train: {_padding(data, recipe)}")
    if data.first_rows:
        shown.say(f"train: streamed; the first {LOOKED_AT:,} rows of each source were looked at")
    for warning in data.warnings:
        shown.say(warning)


def _lengths(stored: Stored) -> str:
    summary = length_summary(stored.file.lengths())
    shares = ", ".join(f"{share} {summary[share]:,}" for share in ("p50", "p95", "p99"))
    return f"{shares}, at most {stored.audit.longest:,}"


def _padding(data: Prepared, recipe: Recipe) -> str:
    """Return how much of a batch is padding, and the setting that leaves least where that is much less."""
    shares = padding_of(data.stored["train"], recipe.data, recipe.training)
    said = f"{shares[NOW]:.1%} of the places in a batch are padding"
    best = min(_CHEAPER, key=lambda name: shares.get(name, 1.0))
    if shares[NOW] - shares.get(best, 1.0) < _WORTH_SAYING:
        return said
    return f"{said}; {_CHEAPER[best]} would leave {shares[best]:.1%}"
