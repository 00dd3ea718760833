"""A folder that plain transformers loads: weights, configuration, tokenizer; and the model again from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ftune.errors import Problem, RunError
from ftune.models import golden
from ftune.models.finished import Finished
from ftune.models.load import load_model, read_tokenizer
from ftune.models.quiet import quiet
from ftune.recipe.schema import Model
from ftune.weights.files import NAMES, Files
from ftune.weights.folded import Streamed
from ftune.weights.layerwise import computing as computing_layerwise
from ftune.weights.skeleton import absent
from ftune.weights.source import Source


def write(source: Source, folder: Path, dtype: str, max_shard_size: str) -> None:
    """Write whole weights and everything beside them."""
    source.weights.save(folder, dtype, max_shard_size)
    write_tokenizer(source, folder)


def write_tokenizer(source: Source, folder: Path) -> None:
    """Write the tokenizer with its template, and see that what lies there is the one of the training."""
    with quiet():
        source.tokenizer.save_pretrained(folder)
    golden.copy(source.found.folder, folder)
    golden.check(folder, read_tokenizer(str(folder), trust_remote_code=source.found.model.trust_remote_code))


@contextlib.contextmanager
def computing(source: Source, folder: Path) -> Iterator[tuple[Any, str]]:
    """Yield the model of a written folder in float32: loaded as anyone would, or layer by layer if it does not fit."""
    trusted = source.found.model.trust_remote_code
    model = Model(model_name_or_path=str(folder), dtype="float32", trust_remote_code=trusted)
    if source.fits:
        yield load_model(model), "in memory"
        return
    with computing_layerwise(Streamed(Finished(folder, None, model), folder)) as fresh:
        yield fresh, "layer by layer"


@contextlib.contextmanager
def loaded(source: Source, folder: Path) -> Iterator[tuple[Any, str]]:
    """Yield the model of a written folder, loaded as anyone would and computing in float32."""
    trusted = source.found.model.trust_remote_code
    yield load_model(Model(model_name_or_path=str(folder), dtype="float32", trust_remote_code=trusted)), "in memory"


def check_rounding(source: Source, folder: Path, model: Any, dtype: str) -> None:
    """Raise RunError unless each weight is the whole one in `dtype`; what `model` lacks is read from `folder`."""
    files = Files(folder, str(folder))
    for name in source.weights.names():
        held = attrgetter(name)(model)
        require_equal(name, files.read(name) if absent(held) else held, in_type(source.weights.read(name), dtype))


def in_type(whole: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return a weight as a format of this type stores it."""
    return whole.to(NAMES[dtype]) if whole.is_floating_point() else whole


def require_equal(name: str, found: torch.Tensor, expected: torch.Tensor, *, within: float = 0.0) -> None:
    """Raise RunError where a written weight is not what is expected of it."""
    off = (found.float() - expected.float()).abs().max().item() if expected.numel() else 0.0
    if not off <= within:
        what = f"the written `{name}` is not the rounding of the run's weight; nothing was kept"
        why = f"it is off by {off:.3g} where no rounding explains it"
        fix = "use the run's model/ as it is, and report this with its configuration"
        raise RunError(Problem("export-differs", what, why=why, fix=fix))
