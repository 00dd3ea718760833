"""A recipe's text with everything in it that is said elsewhere, so that a search can go on from the text alone."""

from __future__ import annotations

from typing import Any

from ftune import rundir
from ftune.recipe import Loaded, overrides, source, validate
from ftune.recipe.edits import REMOVED, edited, value_at
from ftune.resolve import RunSpec

_FOUND = ("data.train", "data.eval", "data.format", "data.chat_template", "model.model_name_or_path", "tuning.adapter")
"""Settings whose decided values are what a run has found; everything else is decided anew with each change."""


def written_out(loaded: Loaded) -> Loaded:
    """Return a recipe with what `--set` says in its text, and with a number of rows where that was left open."""
    given = sorted(loaded.source.overridden, key=lambda key: key.count("."))
    values = {key: value_at(loaded.source.data, key.split(".")) for key in given}
    gguf, written = "model.gguf_file", value_at(loaded.source.data, ("model", "gguf_file"))
    if "model.model_name_or_path" in values and gguf not in values and written is not None:
        values[gguf] = REMOVED  # it belongs to the model that --set replaced
    if loaded.recipe.training.per_device_train_batch_size == "auto":
        values["training.per_device_train_batch_size"] = loaded.recipe.training.rows_at_once
    return _with(loaded, values)


def recipe_of(spec: RunSpec) -> Loaded:
    """Return the recipe of a run as it can be read anywhere: with its overrides, and with the files that were found."""
    text = overrides.apply(source.parse(rundir.RECIPE, spec.recipe_text), spec.overrides)
    loaded = written_out(validate(text))
    return _with(loaded, {decision.key: decision.value for decision in spec.decisions if decision.key in _FOUND})


def _with(loaded: Loaded, values: dict[str, Any]) -> Loaded:
    if not values:
        return loaded
    file = loaded.source.file
    return validate(source.parse(file, edited(file, loaded.source.text, values)))
