"""Adapters that make up for what quantising took from their base: they belong to it as it was rounded, and say so.

On the unrounded weights they would load, and add what those never lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.errors import Problem, RecipeError, RunError

_DECISIVE = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_skip_modules")
"""What decides which values the codes stand for; the others say how they are stored and computed with."""
_README = "README.md"


def rounding_of(folder: Path) -> dict[str, Any] | None:
    """Return how the base of a saved adapter was rounded, in arguments of BitsAndBytesConfig; None where it was not."""
    path = folder / rundir.BASE_FINGERPRINT
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("rounding") if path.is_file() else None
        return None if found is None else dict(found)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why, fix = f"{type(error).__name__}: {error}", f"restore `{path}` from a copy, or delete it"
        raise RunError(Problem("run-damaged", f"`{path}` cannot be read", why=why, fix=fix)) from None


def require_rounded(model: Any, folder: Path) -> None:
    """Raise RecipeError where a saved adapter belongs to a rounded base, and the model is not rounded as that was."""
    wanted = rounding_of(folder)
    held = getattr(model.config, "quantization_config", None)
    if wanted is None or (held is not None and _decisive(held.to_dict()) == _decisive(wanted)):
        return
    what = f"the adapter in `{folder}` belongs to a base that was rounded as this one is not"
    why = "it makes up for what rounding took, and these weights have lost nothing of it"
    settings = [f"{key}: {str(value).lower()}" for key, value in _decisive(wanted).items() if value is not None]
    fix = f"set tuning.method: qlora with {', '.join(settings)}"
    raise RecipeError(Problem("adapter-rounding", what, why=why, fix=fix))


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings.get(key) for key in _DECISIVE}


def tell(folder: Path, base: str, rounding: Mapping[str, Any]) -> None:
    """Add to the README of an adapter on which base alone it is right."""
    settings = ", ".join(f"{key}={value!r}" for key, value in _decisive(rounding).items() if value is not None)
    path = folder / _README
    before = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n" if path.is_file() else ""
    text = f"""## The base that this adapter belongs to

It makes up for what rounding took from `{base}`, and is wrong on the weights as they are. Load the base with

```python
quantization_config = BitsAndBytesConfig({settings})
```
"""
    path.write_text(before + text, encoding="utf-8")
