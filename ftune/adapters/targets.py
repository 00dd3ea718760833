"""Which layers get an adapter: refuses names that are no layer, and tells those that are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ftune.adapters.bits import is_quantised
from ftune.adapters.options import PlaceOptions, TargetOptions
from ftune.errors import Problem, RecipeError


def check_names(model: Any, options: TargetOptions) -> None:
    """Refuse each name or number that is no layer: PEFT passes over one as long as another matches."""
    layers = {name for name, _ in model.named_modules()}
    ends = {name.rpartition(".")[2] for name in layers}
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        wanted = getattr(options, key, None)
        for name in wanted if isinstance(wanted, list) else ():
            if not any(layer == name or layer.endswith("." + name) for layer in layers):
                near = difflib.get_close_matches(name, ends, n=1)
                fix = f"did you mean {near[0]}?" if near else _linear_layers(model)
                raise RecipeError(Problem("lora-targets", f"tuning.{key}: this model has no layer `{name}`", fix=fix))
    if isinstance(options, PlaceOptions):
        _check_numbers(model, options, layers)
    _check_tokens(model, getattr(options, "trainable_token_indices", None))


def _check_numbers(model: Any, options: PlaceOptions, layers: set[str]) -> None:
    if options.layers_to_transform is not None:
        _check_counted(layers, options.target_modules)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    beyond = [number for number in options.layers_to_transform or () if count is not None and number >= count]
    if beyond:
        what = f"tuning.layers_to_transform: this model has no layer {beyond[0]}"
        raise RecipeError(Problem("lora-targets", what, fix=f"its {count} layers are numbered 0 to {count - 1}"))
    if options.layers_pattern is not None and options.layers_to_transform is None:
        what = "tuning.layers_pattern has nothing to find"
        fix = "set layers_to_transform, or remove layers_pattern"
        raise RecipeError(Problem("lora-options", what, why="it says where layers_to_transform counts", fix=fix))


def _check_counted(layers: set[str], wanted: str | list[str]) -> None:
    whole = [name for name in wanted if isinstance(wanted, list) and name in layers]
    if whole or (isinstance(wanted, str) and wanted != "all-linear"):
        what = "tuning.layers_to_transform would be ignored"
        why = f"PEFT counts layers only for names that are in each of them, and {(whole or [wanted])[0]} is in one"
        fix = "name layers by their last part, such as q_proj, or remove layers_to_transform"
        raise RecipeError(Problem("lora-options", what, why=why, fix=fix))


def _check_tokens(model: Any, wanted: list[int] | None) -> None:
    rows = model.get_input_embeddings().num_embeddings
    beyond = [number for number in wanted or () if number >= rows]
    if beyond:
        what = f"tuning.trainable_token_indices: this model has no token {beyond[0]}"
        raise RecipeError(Problem("lora-targets", what, fix=f"its tokens are numbered 0 to {rows - 1}"))


def spelled_out(model: Any, options: PlaceOptions) -> str | list[str]:
    """Return the target modules; with numbers of layers PEFT takes no `all-linear`, but the names it stands for.

    Only the last part of each: a module that is named in full gets an adapter in whichever layer it is.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    wanted = options.target_modules
    if wanted != "all-linear" or options.layers_to_transform is None:
        return wanted
    head = model.get_output_embeddings()
    linear = (torch.nn.Linear, Conv1D)
    found = {name for name, module in model.named_modules() if isinstance(module, linear) and module is not head}
    return sorted({name.rpartition(".")[2] for name in found})


def refuse_whole_quantised(model: Any, wanted: list[str] | None) -> None:
    """Refuse to train whole layers that are held in few bits: codes have no gradient."""
    for name, module in model.named_modules():
        if is_quantised(module) and any(name == one or name.endswith("." + one) for one in wanted or ()):
            what = f"tuning.modules_to_save: `{name}` is quantised, and cannot be trained whole"
            fix = "remove it there: as one of target_modules it has an adapter; or name it in llm_int8_skip_modules"
            raise RecipeError(Problem("lora-options", what, why="its weights are stored as integers", fix=fix))


def refused(model: Any, wanted: str | list[str], why: str, *, nothing_matches: bool = False) -> Problem:
    """Say which layers there are: PEFT's own message does not."""
    first = why.split("\n", maxsplit=1)[0]
    about_layers = nothing_matches or any(word in first for word in ("arget modules", "modules were", "not supported"))
    if not about_layers:
        return Problem("lora-options", "PEFT refuses these options of lora", why=first, fix="`ftune explain lora`")
    what = f"no adapter can be put on {wanted!r}"
    if nothing_matches:
        what = "a name or pattern of tuning matches no layer that gets an adapter"
    return Problem("lora-targets", what, why=first, fix=_linear_layers(model) + "; or write target_modules: all-linear")


def matched(model: Any, options: TargetOptions, layers: Mapping[str, Any]) -> list[str]:
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
