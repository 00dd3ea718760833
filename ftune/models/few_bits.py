"""Load a model whose weights are codes on the disk already: ftune's own folders, and GPTQ's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ftune.models.quiet import quiet
from ftune.quantized.codes import GroupCodes
from ftune.quantized.gptq_files import take_gptq
from ftune.quantized.model import put_codes
from ftune.quantized.saved import METHOD, read_quantized
from ftune.recipe.schema import Model

Read = tuple[dict[str, GroupCodes], dict[str, torch.Tensor]]


_CODED = ("packed", "scale", "offset", "group_index")
"""What a layer in few bits has in the place of a weight."""


def load_codes(model: Model, folder: Path, config: Any) -> tuple[Any, dict[str, list[str]]] | None:
    """Return the model with its codes in place, and what did not fit; None where a folder has no codes.

    What did not fit is reported as transformers does: `missing_keys`, `unexpected_keys`.
    """
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method not in _READERS:
        return None
    layers, rest = _READERS[method](folder, settings)
    del config.quantization_config
    loaded = _skeleton(model, config)
    put_codes(loaded, layers)
    with torch.no_grad():
        found = loaded.load_state_dict(rest, strict=False)
    loaded.tie_weights()
    put = {f"{name}.{part}" for name in layers for part in _CODED} | set(getattr(loaded, "all_tied_weights_keys", {}))
    missing = [key for key in found.missing_keys if key not in put]
    loaded.is_quantized = True  # so that methods that move the weights themselves refuse it
    report = {"missing_keys": missing, "unexpected_keys": list(found.unexpected_keys)}
    return loaded.eval(), {**report, "mismatched_keys": [], "error_msgs": []}


def _skeleton(model: Model, config: Any) -> Any:
    """Return the model without numbers in it: memory that nobody writes to is not taken."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    dtype = getattr(config, "dtype", None) if model.dtype == "auto" else getattr(torch, model.dtype)
    more = {} if model.attn_implementation == "auto" else {"attn_implementation": model.attn_implementation}
    with quiet(), no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code, **more)


def _own(folder: Path, settings: Mapping[str, Any]) -> Read:
    return read_quantized(folder)


def _gptq(folder: Path, settings: Mapping[str, Any]) -> Read:
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return take_gptq(tensors, settings)


_READERS: dict[str, Callable[[Path, Mapping[str, Any]], Read]] = {METHOD: _own, "gptq": _gptq}
"""By the `quant_method` of config.json."""
