"""Which layers get an adapter: refuses names that are no layer, and tells those that are."""

from __future__ import annotations

import difflib
from typing import Any

from ftune.adapters.options import LoRAOptions
from ftune.errors import Problem, RecipeError


def check_names(model: Any, options: LoRAOptions) -> None:
    """Refuse each name that is no layer: PEFT passes over one as long as another matches."""
    layers = {name for name, _ in model.named_modules()}
    ends = {name.rpartition(".")[2] for name in layers}
    for key in ("target_modules", "modules_to_save"):
        wanted = getattr(options, key)
        for name in wanted if isinstance(wanted, list) else ():
            if not any(layer == name or layer.endswith("." + name) for layer in layers):
                near = difflib.get_close_matches(name, ends, n=1)
                fix = f"did you mean {near[0]}?" if near else _linear_layers(model)
                raise RecipeError(Problem("lora-targets", f"tuning.{key}: this model has no layer `{name}`", fix=fix))


def refused(model: Any, wanted: str | list[str], why: str) -> Problem:
    """Say which layers there are: PEFT's own message does not."""
    first = why.split("\n", maxsplit=1)[0]
    if "arget modules" not in first:
        return Problem("lora-options", "PEFT refuses these options of lora", why=first, fix="`ftune explain lora`")
    what = f"no adapter can be put on {wanted!r}"
    return Problem("lora-targets", what, why=first, fix=_linear_layers(model) + "; or write target_modules: all-linear")


def _linear_layers(model: Any) -> str:
    import torch

    layers = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return "this model's linear layers are " + ", ".join(sorted(layers))
