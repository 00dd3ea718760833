"""From `model_name_or_path` to a folder on this disk, without torch: everything after it reads only that folder."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftune.errors import MachineError, Problem, RecipeError, RunError
from ftune.places import PACKAGE, expanded, meant_as_model_folder, package_folder
from ftune.recipe.schema import Model
from ftune.resolve.files import model_is_a_file, package_missing
from ftune.tensor_files import damaged

Say = Callable[[str], None]

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""What weight files are called; an index beside them names the shards."""


HQQ_PICKLE = "qmodel.pt"
"""What the hqq package's `save_quantized` writes."""


def silent(_line: str) -> None:
    """Say nothing."""


def source_directory(model: Model, say: Say = silent) -> str:
    """Return the folder that `from_pretrained` takes; a GGUF is converted first, a hub model downloaded."""
    folder = raw_directory(model, say)
    if model.gguf_file is None:
        return folder
    from ftune.models import gguf

    return str(gguf.converted(gguf.find(Path(folder), model.gguf_file), model.gguf_file, say))


def raw_directory(model: Model, say: Say = silent) -> str:
    """Return the folder as it is found: of the package, on the disk, or in the hub's cache."""
    name = model.model_name_or_path
    if name.startswith(PACKAGE):
        found = package_folder(name)
        if found is None:
            raise MachineError(package_missing(name))
        return str(found)
    path = expanded(name)
    if path.is_dir():
        return str(path.resolve())
    if path.is_file():
        raise RecipeError(model_is_a_file(name, path.resolve()))
    if meant_as_model_folder(name):
        raise _unknown(name, "there is no such directory", _near_folders(path))
    from ftune.models import hub

    return hub.folder(model, say)


def public_name(model: Model) -> str | None:
    """Return the hub name to write into saved configurations; None where only the folder itself can be named."""
    name = model.model_name_or_path
    on_disk = name.startswith(PACKAGE) or model.gguf_file is not None or expanded(name).exists()
    return None if on_disk or meant_as_model_folder(name) else name


def config_of(folder: Path, name: str) -> dict[str, Any]:
    """Return a folder's config.json; says what the folder holds instead where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise _unknown(name, f"`{folder}` has no config.json", _what_instead(folder))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(str(path), str(error)) from None
    if not isinstance(values, dict):
        raise damaged(str(path), "it does not hold a JSON object")
    return values


def check_weights(folder: Path, name: str) -> None:
    """Refuse a folder without weights, or with shards missing, before anything slow begins."""
    files = [path for pattern in WEIGHTS for path in folder.glob(pattern)]
    indexes = sorted(folder.glob("*.index.json"))
    for index in indexes:
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise damaged(str(index), f"it cannot be read: {error}") from None
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing and len(missing) == len(shards) and len(indexes) > 1:
            continue
        if missing:
            raise damaged(str(folder), f"{index.name} names files that are not there: {', '.join(missing[:4])}")
    if not files:
        raise _unknown(name, f"`{folder}` holds no weights (model.safetensors)", _what_instead(folder))


def refuse_pickles(folder: Path, name: str) -> None:
    """Refuse weights that are Python pickles, which may run code when they are read."""
    if any(folder.glob("*.safetensors")):
        return
    found = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(ending))
    if found:
        what = f"the weights of `{name}` are a Python pickle: {', '.join(found[:3])}"
        why = "a pickle can run any code when it is read"
        fix = "if you trust its author, load it with transformers or peft and save it again, which writes safetensors; "
        fix += "or train on it as it is with model.trust_remote_code: true"
        if HQQ_PICKLE in found:
            fix = f"if you trust its author, {_hqq_as_safetensors(folder)}"
        raise RunError(Problem("pickle-weights", what, why=why, fix=fix))


def _unknown(name: str, why: str, fix: str) -> RecipeError:
    return RecipeError(Problem(rule="unknown-model", what=f"no model `{name}`", why=why, fix=fix))


def _near_folders(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"`{parent}` does not exist either; a path counts from the folder you are in, `{Path.cwd()}`"
    folders = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, folders, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(f"`{parent / one}`" for one in near) + "?"
    return f"`{parent}` holds " + (", ".join(folders[:8]) if folders else "no folders")


def _what_instead(folder: Path) -> str:
    if (folder / HQQ_PICKLE).is_file():
        return f"{HQQ_PICKLE} is not read: {_hqq_as_safetensors(folder)}"
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"set model.gguf_file to `{ggufs[0]}`"
    if (folder / "adapter_config.json").is_file():
        return "this is an adapter: name its base model instead, or merge the run first (`ftune merge`)"
    if (folder / "model" / "config.json").is_file():
        return f"the model of this run directory is `{folder / 'model'}`"
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        return f"did you mean `{folder / inner[0]}`?"
    return "name a folder that `save_pretrained` wrote, or a hub name such as `Qwen/Qwen2.5-0.5B`"


def _hqq_as_safetensors(folder: Path) -> str:
    return (
        f"write it as safetensors: from hqq.models.hf.base import AutoHQQHFModel as HQQ; model = "
        f'HQQ.from_quantized("{folder}", device="cpu"); HQQ.save_to_safetensors(model, "NEW FOLDER")'
    )
