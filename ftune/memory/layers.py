"""The peaks of a deep model from traces of shallow ones.

Where all layers are alike, or a pattern of them repeats, each phase's peak grows by the same bytes with every period.
Two traces therefore stand for all depths; a third proves it, where the two do not agree on what made the peak.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ftune.memory.events import Owner, Trace
from ftune.memory.peak import Peak, peak, phases

_FEWEST = 3
"""Below the first and the last layer are too near to each other for a peak to be where it is in a deep model."""


def period(config: Mapping[str, Any]) -> int | None:
    """Return after how many layers a model repeats itself; None where it does not.

    Layers differ by the lists in config.json that have an entry for each.
    """
    text = config.get("text_config", config)
    count = depth(config)
    if count == 0 or _differs_otherwise(text):
        return None
    lists = [value for value in text.values() if isinstance(value, list) and len(value) == count]
    for length in range(1, max(1, count // 2) + 1):
        if all(value[place] == value[place % length] for value in lists for place in range(count)):
            return length
    return None


def depth(config: Mapping[str, Any]) -> int:
    """Return how many layers a config.json says; 0 where it does not say."""
    text = config.get("text_config", config)
    found = next((text[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in text), 0)
    return int(found)


def _differs_otherwise(text: Mapping[str, Any]) -> bool:
    """Return whether some layers are of another kind by their number: dense ones before experts, and the like."""
    return any(
        text.get(key) for key in ("first_k_dense_replace", "mlp_only_layers", "layer_group_size", "attn_layer_offset")
    ) or text.get("decoder_sparse_step", 1) not in (None, 1)


def peaks_of_depth(trace_of: Callable[[int], Trace], layers: int, *, every: int = 1) -> dict[str, Peak]:
    """Return the peak of each phase of a model of `layers` layers that repeats itself `every` so many.

    `trace_of` traces a number of layers. Where the peak's place does not settle, all layers are traced.
    """
    fewest = _FEWEST + (layers - _FEWEST) % every
    step = 2 * every if every == 1 else every
    if layers - fewest < 2 * step or (layers - fewest) % every:
        return peaks_of(trace_of(layers))
    few = peaks_of(trace_of(fewest))
    for base in (fewest, fewest + step):
        more = peaks_of(trace_of(base + step))
        if _alike(few, more):
            return _extended(few, more, base, base + step, layers)
        few = more
    return peaks_of(trace_of(layers))


def peaks_of(trace: Trace) -> dict[str, Peak]:
    """Return the peak of each phase."""
    return {phase: peak(trace, phase) for phase in phases(trace)}


def _alike(few: Mapping[str, Peak], more: Mapping[str, Peak]) -> bool:
    return few.keys() == more.keys() and all(_place(few[phase]) == _place(more[phase]) for phase in few)


def _place(found: Peak) -> tuple[str, str]:
    return found.operation, re.sub(r"\.\d+(?=\.|$)", ".#", found.module)


def _extended(
    few: Mapping[str, Peak], more: Mapping[str, Peak], few_layers: int, more_layers: int, layers: int
) -> dict[str, Peak]:
    def at(low: int, high: int) -> int:
        return low + (high - low) * (layers - few_layers) // (more_layers - few_layers)

    return {
        phase: Peak(
            at(few[phase].size_bytes, more[phase].size_bytes),
            {owner: at(few[phase].by_owner[owner], more[phase].by_owner[owner]) for owner in Owner},
            phase,
            more[phase].module,
            more[phase].operation,
        )
        for phase in more
    }


def most(found: Mapping[str, Peak]) -> Peak:
    """Return the largest of the phases' peaks."""
    return max(found.values(), key=lambda one: one.size_bytes)
