"""A model in few bits as a folder of its own, and as one that transformers loads through torchao."""

from __future__ import annotations

import json
from collections import ChainMap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftune import rundir
from ftune.errors import Problem, RecipeError
from ftune.quantized.codes import GroupCodes
from ftune.quantized.files import read_codes, write_codes
from ftune.quantized.kinds import OWN
from ftune.quantized.model import codes_of, quantized_layers

REST = "rest.safetensors"
"""Everything but the codes. Not named as transformers looks for it: it would make up the weights that are missing."""


def save_quantized(model: Any, folder: Path, *, max_shard_size: str) -> None:
    """Write a quantised model so that ftune loads it again, to talk to or to train on; the tokenizer is not written.

    The folder gets config.json, the codes as in `files`, and the other weights in their own dtype. Shards of either
    stand by themselves, and need no index: weights of one that is missing are missing in the model.
    """
    from safetensors.torch import save_file

    codes, rest = codes_of(model), _rest(model)
    for name, layers in _shards({layer: one.nbytes for layer, one in codes.items()}, rundir.CODES, max_shard_size):
        write_codes(folder / name, {layer: codes[layer] for layer in layers})
    for name, keys in _shards({key: one.nbytes for key, one in rest.items()}, REST, max_shard_size):
        save_file({key: rest[key] for key in keys}, folder / name, metadata={"format": "pt"})
    _write_config(model, folder, {"quant_method": OWN})


def read_quantized(folder: Path) -> tuple[dict[str, GroupCodes], dict[str, torch.Tensor]]:
    """Return the codes and the other weights that `save_quantized` wrote."""
    from safetensors.torch import load_file

    codes = [read_codes(path) for path in _shards_in(folder, rundir.CODES)]
    rest = [load_file(path) for path in _shards_in(folder, REST)]
    return dict(ChainMap(*codes)), dict(ChainMap(*rest))


def _shards(sizes: dict[str, int], name: str, max_shard_size: str) -> list[tuple[str, list[str]]]:
    """Return the names of files, made of the name of a single one, and what goes into each, by sizes in bytes."""
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern=name.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    return list(split.filename_to_tensors.items())


def _shards_in(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(name.replace(".", "*.")))


def save_torchao(model: Any, folder: Path, *, max_shard_size: str) -> None:
    """Write a quantised model as plain transformers loads it with torchao installed; the tokenizer is not written.

    Each weight becomes an `IntxUnpackedToInt8Tensor`, which has a floating zero-point: z = -offset / scale. A code
    takes a byte, whatever its bits. Raises RecipeError for groups that are not consecutive: torchao has none.
    """
    from safetensors.torch import save_file

    tensors = _rest(model)
    said: dict[str, Any] = {name: {"_type": "Tensor"} for name in tensors}
    dtype = str(model.dtype).removeprefix("torch.")
    for name, codes in codes_of(model).items():
        _require_consecutive(name, codes)
        for part, tensor in _as_torchao(codes).items():
            tensors[f"{name}._weight_{part}"] = tensor
        said[f"{name}.weight"] = {
            "_type": "IntxUnpackedToInt8Tensor",
            "_data": {
                "target_dtype": {"_type": "torch.dtype", "_data": f"int{codes.bits}"},
                "block_size": [1, codes.group_size],
                "dtype": {"_type": "torch.dtype", "_data": dtype},
                "activation_quantization": None,
            },
            "_tensor_data_names": ["qdata", "scale", "zero_point"],
        }
    header = {name: json.dumps(entry) for name, entry in said.items()}
    header |= {"tensor_names": json.dumps(list(said)), "format": "pt"}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    files = _shards(sizes, "model.safetensors", max_shard_size)
    for file, keys in files:
        save_file({key: tensors[key] for key in keys}, folder / file, metadata=header)
    if len(files) > 1:
        where = {key: file for file, keys in files for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_config(model, folder, _torchao_settings(next(iter(codes_of(model).values()))))


def _as_torchao(codes: GroupCodes) -> dict[str, torch.Tensor]:
    """Return W = (qdata - zero_point) scale with signed qdata; the division is made in float64."""
    half = 2 ** (codes.bits - 1)
    scale = codes.scale.double()
    return {
        "qdata": (codes.codes().to(torch.int16) - half).to(torch.int8),
        "scale": codes.scale.float().contiguous(),
        "zero_point": (-codes.offset.double() / scale - half).float().contiguous(),
    }


def _torchao_settings(codes: GroupCodes) -> dict[str, Any]:
    """Return what transformers wants to read in config.json; the tensors themselves say how they are stored."""
    data = {
        "granularity": {"_data": {"group_size": codes.group_size}, "_type": "PerGroup", "_version": 1},
        "intx_choose_qparams_algorithm": {"_data": "AFFINE", "_type": "IntxChooseQParamsAlgorithm"},
        "intx_packing_format": {"_data": "UNPACKED_TO_INT8", "_type": "IntxPackingFormat"},
        "mapping_type": {"_data": "ASYMMETRIC", "_type": "MappingType"},
        "scale_dtype": None,
        "weight_dtype": {"_data": f"int{codes.bits}", "_type": "torch.dtype"},
    }
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_data": data, "_type": "IntxWeightOnlyConfig", "_version": 2}},
        "modules_to_not_convert": None,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def _rest(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that are not codes, each shared one once: transformers ties it again by its config."""
    coded = {f"{name}.{part}" for name, layer in quantized_layers(model) for part, _ in layer.named_buffers()}
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name not in coded:
            found.setdefault(tensor.data_ptr(), (name, tensor.contiguous()))
    return dict(found.values())


def _write_config(model: Any, folder: Path, quantization: dict[str, Any]) -> None:
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = quantization
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _require_consecutive(name: str, codes: GroupCodes) -> None:
    if codes.group_index is not None:
        what = f"`{name}` has groups of inputs that are not neighbours, which torchao cannot store"
        raise RecipeError(Problem("torchao-groups", what, fix="write the dequantised model, or ftune's own format"))
