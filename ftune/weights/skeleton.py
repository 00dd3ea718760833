"""A model whose weights are not in memory: its modules and names, filled one part at a time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftune.models.load import HARMLESS_EXTRAS
from ftune.models.quiet import quiet
from ftune.weights.files import Files

Read = Callable[[str], torch.Tensor]


class NotStreamable(Exception):  # noqa: N818 (no mistake: there is another way)
    """The files cannot be read tensor by tensor; the text says why."""


def skeleton(folder: str) -> Any:
    """Return the causal language model of a folder without its weights; what it computes at its making is there."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for module in model.modules():
            for leaf, weight in module._parameters.items():
                if weight is not None and weight.is_meta:
                    # One number seen as a whole tensor: peft moves adapters to where their base is, which must be.
                    stand_in = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                    module._parameters[leaf] = torch.nn.Parameter(stand_in, requires_grad=False)
        model.tie_weights()
    return model.eval()


def absent(weight: torch.Tensor) -> bool:
    """Return whether a weight is one of a skeleton's that no file has filled."""
    return weight.dim() > 0 and not any(weight.stride())


def ties(model: Any) -> dict[str, str]:
    """Return for each name that shares its weight with another the one it is saved under."""
    groups: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(weight), []).append(name)
    dropped = {re.sub(r"\\(.)", r"\1", key) for key in (getattr(model, "_tied_weights_keys", None) or ())}
    found = {}
    for names in groups.values():
        if len(names) > 1:
            kept = next((name for name in names if name not in dropped), names[0])
            found.update(dict.fromkeys(names, kept))
    return found


def located(model: Any, files: Files) -> dict[str, str]:
    """Return the key in the files of each weight of a model; raises NotStreamable unless they fit one to one."""
    prefix = f"{model.base_model_prefix}."
    shared = ties(model)
    found, used = {}, set()
    for name, weight in model.state_dict().items():
        aliases = [name, *(other for other in shared if shared.get(other) == shared.get(name) and name in shared)]
        keys = [key for alias in aliases for key in (alias, alias.removeprefix(prefix)) if key in files.shapes]
        if not keys:
            raise NotStreamable(f"its files have no `{name}`")
        if files.shapes[keys[0]] != tuple(weight.shape):
            raise NotStreamable(f"`{name}` has another shape in its files")
        found[name] = keys[0]
        used.update(keys)
    extra = [key for key in files.shapes if key not in used and not HARMLESS_EXTRAS.search(key)]
    if extra:
        raise NotStreamable(f"its files name weights otherwise than its modules do (`{extra[0]}`)")
    twice = {name: key for name, key in found.items() if name in shared and found[shared[name]] != key}
    for name, key in twice.items():
        if not torch.equal(files.read(key), files.read(found[shared[name]])):
            raise NotStreamable(f"`{name}` and `{shared[name]}` are one weight, and its files have two")
    return found


@contextlib.contextmanager
def filled(module: Any, prefix: str, read: Read) -> Iterator[None]:
    """Give a module and what is in it the weights that it lacks, in float32, and take them away again."""
    taken = []
    for name, weight in list(module.named_parameters(remove_duplicate=False)):
        if absent(weight):
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            taken.append((owner, leaf, owner._parameters[leaf]))
            value = read(prefix + name)
            value = value.float() if value.is_floating_point() else value
            owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        for owner, leaf, weight in taken:
            owner._parameters[leaf] = weight
