"""Adapters that start with a part of the weights, and are saved so that they fit the weights as they were.

PiSSA (Meng et al., 2024, arXiv 2404.02948) and OLoRA (Bueyuekakyuez, 2024, arXiv 2406.01775) take s B0 A0 out of W and
train B A beside the rest. On the weights W that everybody has, that adapter would count its beginning twice:

    (W - s B0 A0) + s B A  =  W + s [B, -B0] [A; A0]

so what is saved is the right-hand side: an ordinary adapter of twice the rank.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ftune.adapters.options import AdapterOptions
from ftune.errors import Problem, RecipeError


def check(model: Any, start: Any, options: AdapterOptions) -> None:
    """Refuse what such a start cannot be combined with."""
    if not str(start).startswith(("pissa", "olora")):
        return
    what = why = ""
    if getattr(model, "is_quantized", False):
        what, why = f"{start} needs unquantised weights", "it takes a part out of them, and the rest is no longer codes"
    elif options.use_dora:
        what, why = f"{start} does not go with use_dora", "DoRA's magnitudes would be those of what is left of W"
    elif any(type(module).__name__ == "Conv1D" for module in model.modules()):
        what, why = f"{start} does not go with this model", "PEFT takes its layers' weights for transposed ones"
    if what:
        raise RecipeError(Problem("lora-options", what, why=why, fix="set init_lora_weights: true"))


def remember(adapted: Any, start: Any) -> None:
    """Keep what was taken out of the weights, in the memory of the host; a resumed run takes the same again."""
    if not str(start).startswith(("pissa", "olora")):
        return
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapted)
    adapted.taken_from_base = {
        name: tensor.detach().cpu().clone() for name, tensor in state.items() if ".lora_" in name
    }


def save(model: Any, folder: Path) -> None:
    """Write the adapter, without its beginning where that was taken out of the base."""
    model.save_pretrained(folder)
    if hasattr(model, "taken_from_base"):
        _save_difference(model, folder)


def _save_difference(model: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model)
    for name, first in model.taken_from_base.items():
        last = state[name].detach().cpu()
        if "lora_A" in name:
            state[name] = torch.cat([last, first], dim=0)
        else:
            state[name] = torch.cat([last, -first], dim=1)
    config = copy.deepcopy(model.peft_config["default"])
    # The scale alpha / r, or alpha / sqrt(r), stays as it was.
    wider = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, wider * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: wider * alpha for name, alpha in config.alpha_pattern.items()}
    config.init_lora_weights, config.inference_mode = True, True
    config.save_pretrained(folder)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
