"""What a run starts from, loaded: rows as tokens, and the base model."""

from __future__ import annotations

from typing import Any

from ftune import plugin
from ftune.data.prepare import LOOKED_AT, Prepared, prepare
from ftune.errors import RecipeError
from ftune.models.cache import cache_directory
from ftune.models.load import load_model
from ftune.resolve import Decision, RunSpec
from ftune.training import directory, progress


def load_base(spec: RunSpec, shown: progress.Progress) -> tuple[RunSpec, Any]:
    """Load the model; where ftune chose an attention that this architecture lacks, it chooses again and says so."""
    try:
        return spec, load_model(spec.recipe.model, device_type=spec.device_type, say=shown.say)
    except RecipeError as error:
        chosen = any(decision.key == "model.attn_implementation" for decision in spec.decisions)
        if not chosen or error.problems[0].rule != "attention-unsupported":
            raise
    decision = Decision("model.attn_implementation", "eager", "this architecture has no fused attention")
    shown.say(f"{decision.key} = {decision.value}: {decision.why}")
    spec = directory.settle(spec, decision)
    return spec, load_model(spec.recipe.model, device_type=spec.device_type, say=shown.say)


def load_rows(spec: RunSpec, tokenizer: object) -> Prepared:
    return prepare(
        spec.recipe.data,
        tokenizer=tokenizer,
        seed=spec.recipe.training.seed,
        cache=cache_directory() / "tokens",
        learns=plugin.objective(spec.recipe.objective.method).formats,
    )


def prompts_of(spec: RunSpec, data: Prepared) -> tuple[object, ...]:
    asked = spec.recipe.training.sample_prompts
    return data.prompts if asked is None else tuple(asked)


def tell(data: Prepared, shown: progress.Progress) -> None:
    for name, sources in data.stored.items():
        for each in sources:
            counts, which = each.audit, f" {each.part.source}" if len(sources) > 1 else ""
            shown.say(
                f"{name}{which}: {counts.rows:,} {each.encoding.format.name} rows, {counts.tokens:,} tokens, "
                f"{counts.supervised_tokens:,} of them learned, longest {counts.longest:,}"
            )
    if data.first_rows:
        shown.say(f"train: streamed; the first {LOOKED_AT:,} rows of each source were looked at")
    for warning in data.warnings:
        shown.say(warning)
