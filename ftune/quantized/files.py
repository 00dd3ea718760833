"""Codes on the disk: one safetensors file whose header says how to read them and what they are.

For each layer NAME: `NAME.packed`, `NAME.scale`, `NAME.offset` and, where its groups are not consecutive,
`NAME.group_index`. The header's `layers` is a JSON object, name to {bits, in_features}, and its `fingerprint` what
`fingerprint` below makes of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from ftune import rundir
from ftune.errors import Problem, RunError
from ftune.quantized.codes import GroupCodes

_FORMAT, _VERSION = "ftune-codes", "1"
_PARTS = ("packed", "scale", "offset", "group_index")


def write_codes(path: Path, layers: Mapping[str, GroupCodes]) -> None:
    """Write the codes of a model's layers; the file is there whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"{name}.{part}": tensor for name, codes in layers.items() for part, tensor in _parts(codes).items()}
    described = {name: {"bits": codes.bits, "in_features": codes.in_features} for name, codes in layers.items()}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "layers": json.dumps(described),
        "fingerprint": fingerprint(layers),
    }
    partial = path.with_name(path.name + rundir.PARTIAL_SUFFIX)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=header)
    partial.replace(path)


def read_codes(path: Path, device: torch.device | str = "cpu") -> dict[str, GroupCodes]:
    """Return the codes of a file by layer; raises RunError where it is damaged or of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as tensors:
            header, names = tensors.metadata() or {}, set(tensors.keys())
            if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
                raise damaged(path, f"it is not a file of {_FORMAT} {_VERSION}")
            layers = {}
            for name, said in json.loads(header["layers"]).items():
                found = {part: tensors.get_tensor(key) for part in _PARTS if (key := f"{name}.{part}") in names}
                layers[name] = GroupCodes(**found, bits=said["bits"], in_features=said["in_features"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, str(error).split("\n")[0][:300]) from None
    if fingerprint(layers) != header["fingerprint"]:
        raise damaged(path, "its numbers are not those that were written")
    return layers


def copy_codes(source: Path, target: Path) -> None:
    """Put the file in another folder too, where the file system can without taking its room a second time."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def fingerprint(layers: Mapping[str, GroupCodes]) -> str:
    """Return the SHA-256 of codes, scales and offsets: equal where two models in few bits are the same."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        digest.update(f"{name} {layers[name].bits} {layers[name].shape}".encode())
        for tensor in _parts(layers[name]).values():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _parts(codes: GroupCodes) -> dict[str, torch.Tensor]:
    return {part: tensor for part in _PARTS if (tensor := getattr(codes, part)) is not None}


def damaged_layer(name: str, why: str) -> RunError:
    """Return the error for a layer of a downloaded model whose codes cannot be read."""
    fix = "copy or download the model again, and compare its size with the original"
    return RunError(Problem("weights-damaged", f"the codes of `{name}` are damaged or incomplete", why=why, fix=fix))


def damaged(path: Path, why: str) -> RunError:
    """Return the error for codes that cannot be used."""
    fix = "restore the file from a copy; without it the run has to be started anew"
    return RunError(Problem("codes-damaged", f"the quantised weights `{path}` cannot be used", why=why, fix=fix))
