"""A run's adapter folded into the codes of its base, for formats that keep them: exact, and no code changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import torch

from ftune import rundir
from ftune.adapters.pooled import fold_pooled
from ftune.errors import Problem, RecipeError
from ftune.models.load import load_model
from ftune.quantized.linear import QuantizedLinear
from ftune.recipe.schema import Model
from ftune.weights.files import NAMES
from ftune.weights.source import Source
from ftune.weights.written import in_type, require_equal, write_tokenizer


def check(source: Source) -> None:
    """Refuse a run that was not trained upon codes."""
    if not source.found.is_coded:
        what = f"the run `{source.run_directory}` has no codes to write"
        why = "its adapter was trained beside whole weights, and rounding those loses some of what it learned"
        fix = "use --format safetensors, or train with tuning.method: qalora"
        raise RecipeError(Problem("no-codes", what, why=why, fix=fix))


def bytes_needed(source: Source, dtype: str) -> int:
    """Return about how many bytes the codes and the other weights take; the codes' file holds the former."""
    return (source.found.folder / rundir.CODES).stat().st_size + source.parameters * NAMES[dtype].itemsize


class Save(Protocol):
    """Write a model in few bits into a folder."""

    def __call__(self, model: Any, folder: Path, *, max_shard_size: str) -> None: ...


def write(source: Source, folder: Path, dtype: str, max_shard_size: str, save: Save) -> None:
    """Write the merged model with `save`; weights that are no codes in `dtype`, scales and offsets as they are."""
    model = fold_pooled(source.taken(), over=QuantizedLinear)
    for weight in model.parameters():
        weight.data = weight.data.to(NAMES[dtype])
    model.config.dtype = NAMES[dtype]
    save(model, folder, max_shard_size=max_shard_size)
    write_tokenizer(source, folder)


@contextlib.contextmanager
def loaded_as_float32(source: Source, folder: Path) -> Iterator[tuple[Any, str]]:
    """Yield the model of a folder that torchao reads: loaded in the type it was written for, then taken to float32.

    Loaded in float32 at once, weights of torchao's classes would still compute in that type, and the rest would not.
    """
    trusted = source.found.model.trust_remote_code
    model = load_model(Model(model_name_or_path=str(folder), trust_remote_code=trusted))
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(weight.data.to(torch.float32), requires_grad=False)
    yield model, "in memory"


def check_rounding(source: Source, model: Any, dtype: str) -> None:
    """Raise RunError unless a model loaded from what was written has every weight of the whole one.

    Those in codes up to the order of sums, whatever the type of the others, which are in `dtype`.
    """
    for name in source.weights.names():
        whole = source.weights.read(name)
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, QuantizedLinear) and name.endswith(".weight"):
            require_equal(name, module.codes.dequantise(), whole)
        elif type(data := attrgetter(name)(model).data) is not torch.Tensor:  # codes in a class of torchao's
            require_equal(name, data.dequantize(), whole, within=1e-5 * whole.abs().max().item())
        else:
            require_equal(name, data, in_type(whole, dtype))
