"""Whether a tuning's groups of inputs divide what the layers read, as far as the model's config.json says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ftune.errors import Problem
from ftune.places import config_in, stored_folder
from ftune.plugin import tuning
from ftune.quantized.groups import uneven
from ftune.quantized.kinds import kind_of_codes
from ftune.recipe import Loaded

PLAIN = frozenset(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "granite", "olmo2", "phi3", "smollm3"))
"""Kinds of model whose linear layers read the hidden state, the heads side by side, or the state within the MLP.

Of others their modules say what is read, when the model is loaded.
"""


def problems(loaded: Loaded) -> Iterator[Problem]:
    """Yield the problem of the narrowest layer that cannot be cut into groups."""
    recipe, model = loaded.recipe, loaded.recipe.model
    size = tuning(recipe.tuning.method).group_of_inputs(recipe.tuning.options)
    if size is None or model.gguf_file is not None:
        return
    folder = stored_folder(model.model_name_or_path, loaded.directory, revision=model.revision)
    config = config_in(folder) if folder else None
    if folder is None or config is None or kind_of_codes(folder, config.get("quantization_config")) is not None:
        return
    widths = inputs_of(config)
    place, layer = loaded.source.value(("tuning", "group_size")), f"a layer of `{model.model_name_or_path}`"
    found = (uneven(width, size, layer, every=widths, place=place) for width in widths)
    yield from [problem for problem in found if problem is not None][:1]


def inputs_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return how many inputs the linear layers of a model have; nothing for quantised ones, and other kinds."""
    if config.get("model_type") not in PLAIN or config.get("quantization_config"):
        return ()
    hidden, within, heads, size = (
        found if isinstance(found := config.get(key), int) else 0
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    )
    # Without a head_dim of their own the heads are as wide as the hidden state, or as their kind has them.
    return tuple(sorted({width for width in (hidden, within, heads * size) if width > 0}))
