"""Whole weights rounded to 4 bits by bitsandbytes."""

from __future__ import annotations

import tempfile
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ftune.adapters.bits import dequantised_weight, is_quantised
from ftune.models.load import load_model
from ftune.models.quiet import quiet
from ftune.recipe.schema import Model
from ftune.weights.source import Source
from ftune.weights.written import in_type, require_equal, write_tokenizer


def write(source: Source, folder: Path, dtype: str, max_shard_size: str) -> None:
    """Write the sum of base and adapter in 4 bits; what is no linear layer, and what computes, in `dtype`.

    It is quantised once, from the plain weights: adding the adapter to codes and quantising that would round twice.
    """
    if source.has_adapter:
        source.say("4 bits: what the adapter moved by less than half a step of the codes will be gone")
    quantization = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as whole:
        source.weights.save(Path(whole), dtype, max_shard_size)
        trusted = source.found.model.trust_remote_code
        model = Model(model_name_or_path=whole, dtype=dtype, trust_remote_code=trusted)
        with quiet():
            load_model(model, quantization=quantization).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(source, folder)


def check_rounding(source: Source, model: Any, dtype: str) -> None:
    """Raise RunError unless a model loaded from what was written holds what bitsandbytes makes of each whole weight.

    Weights that are not quantised have to be equal in `dtype`.
    """
    for name in source.weights.names():
        whole = in_type(source.weights.read(name), dtype)
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and is_quantised(module):
            require_equal(name, dequantised_weight(module), _rounded(whole, module.weight.quant_state))
        else:
            require_equal(name, attrgetter(name)(model), whole)


def _rounded(whole: torch.Tensor, state: Any) -> torch.Tensor:
    """Return what is left of a weight in 4 bits, float32, in the blocks that a written one says it has."""
    from bitsandbytes import functional

    double = {"quant_type": "nf4", "blocksize": state.blocksize, "compress_statistics": True}
    return functional.dequantize_4bit(*functional.quantize_4bit(whole, **double)).float()
