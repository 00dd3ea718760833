"""Write one GGUF file, a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, quantize
from gguf.quants import quant_shape_to_byte_shape

from ftune.exports.gguf import _architecture, _vocabulary
from ftune.models import golden
from ftune.weights.shards import in_range

_TYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def path_in(folder: Path) -> Path:
    """Return the file in an exported folder."""
    return next(folder.glob("*.gguf"))


def write(source: Any, folder: Path, dtype: str) -> None:
    """Write the file; memory: the largest weight in float32, and in the type that it is stored in."""
    config = _architecture.config_of(source)
    kind, file_type = _TYPES[dtype]
    name = source.run_directory.resolve().name
    weights = source.weights
    writer = GGUFWriter(folder / f"{name}-{kind.name}.gguf", _architecture.architecture_of(config))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _architecture.describe(writer, config)
    rows = weights.shape("model.embed_tokens.weight")[0]
    _vocabulary.describe(writer, source.tokenizer, rows, _ends(source.folder, config))
    factors = _architecture.rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(_architecture.ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    names = _architecture.names_of(config)
    for weight in weights.names():
        shape = weights.shape(weight)
        stored = _type_of(shape, kind)
        _announce(writer, names.get_name(weight, try_suffixes=(".weight", ".bias")), shape, stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for weight in weights.names():
            value = _architecture.rearranged(weights.read(weight).float(), weight, config)
            stored = _type_of(tuple(value.shape), kind)
            if stored is GGMLQuantizationType.F16:
                in_range(value, weight, torch.float16)
            writer.write_tensor_data(quantize(value.contiguous().numpy(), stored))
    finally:
        writer.close()
    golden.copy(source.found.folder, folder)


def _type_of(shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors stay in float32, as llama.cpp wants them; rows that make no whole blocks stay in float16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _announce(writer: GGUFWriter, name: str | None, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    assert name is not None, "the architecture was checked"
    stored = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind)
    if stored is not None:
        writer.add_tensor_info(name, shape, np.dtype(stored), int(np.prod(shape)) * np.dtype(stored).itemsize)
        return
    in_bytes = quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), raw_dtype=kind)


def _ends(folder: Path, config: Any) -> list[int]:
    """Return every token that ends an answer, as the model's files say."""
    path = folder / "generation_config.json"
    said = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    said = config.eos_token_id if said is None else said
    return [said] if isinstance(said, int) else list(said or ())
