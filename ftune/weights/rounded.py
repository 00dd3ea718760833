"""Whole weights rounded to 4 bits by bitsandbytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ftune.models.load import load_model
from ftune.models.quiet import quiet
from ftune.recipe.schema import Model
from ftune.weights.source import Source
from ftune.weights.written import write_tokenizer


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
