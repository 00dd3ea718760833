"""Which layers get an adapter: refuses names that are no layer, and tells those that are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ftune.adapters.options import LowRankOptions
from ftune.errors import Problem, RecipeError


def check_names(model: Any, options: LowRankOptions) -> None:
    """Refuse each name that is no layer: PEFT passes over one as long as another matches."""
    layers = {name for name, _ in model.named_modules()}
    ends = {name.rpartition(".")[2] for name in layers}
    for key in ("target_modules", "modules_to_save"):
        wanted = getattr(options, key, None)
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


def matched(model: Any, options: LowRankOptions, layers: Mapping[str, Any]) -> list[str]:
    """Return the names of those `layers` that the options ask for an adapter on; raises RecipeError where none is.

    Names mean what they mean to PEFT. Refuses names of other layers: `layers` are all that can have an adapter.
    """
    if isinstance(options.target_modules, str) and options.target_modules.lower() == "all-linear":
        return list(layers)
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=options.target_modules)
    wanted = [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
    other = [name for name in wanted if name not in layers]
    if wanted and not other:
        return wanted
    ends = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    what = f"no adapter can be put on `{other[0]}`" if other else f"no layer matches {options.target_modules!r}"
    why = f"layers that can have one are {ends}"
    raise RecipeError(Problem("lora-targets", what, why=why, fix="name those, or write target_modules: all-linear"))


def _linear_layers(model: Any) -> str:
    import torch

    layers = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return "this model's linear layers are " + ", ".join(sorted(layers))
