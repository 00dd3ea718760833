"""What a saved adapter was made with, read from its adapter_config.json, and where a recipe says otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ftune.errors import Problem
from ftune.places import locate
from ftune.recipe.source import Source, written

CONFIG = "adapter_config.json"
_BEGUN = ("init_lora_weights", "adapter")
"""How an adapter was begun says nothing of how it goes on."""


def made_with(folder: Path | None, keys: Iterable[str]) -> dict[str, Any]:
    """Return those keys of a tuning as a saved adapter has them; nothing where there is no adapter to read."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return {key: found[key] for key in keys if key in found and key not in _BEGUN}


def problems(source: Source) -> Iterator[Problem]:
    """Yield a problem for `tuning.adapter` that names no adapter, and for each key that says otherwise than it."""
    tuning = source.data.get("tuning")
    name = tuning.get("adapter") if isinstance(tuning, dict) else None
    if not isinstance(tuning, dict) or not isinstance(name, str) or not name.strip():
        return
    folder = locate(name, Path(source.file).resolve().parent)
    place = source.value(("tuning", "adapter"))
    if folder is None or not (folder / CONFIG).is_file():
        fix = "name a folder that PEFT's save_pretrained wrote: the model/ of a run, or one of its checkpoints"
        yield Problem("adapter-folder", f"`{name}` holds no {CONFIG}", place, fix=fix)
        return
    for key, had in made_with(folder, tuning).items():
        value = tuning[key]
        lists = isinstance(value, list) and isinstance(had, list)
        if not (sorted(value) == sorted(had) if lists else value == had):
            what = f"the adapter was made with {key}: {written(had)}"
            why = "an adapter goes on as it is: another shape or scale is another adapter"
            fix = f"remove {key} here, or start a new adapter without tuning.adapter"
            yield Problem("adapter-differs", what, source.value(("tuning", key)), why=why, fix=fix)
