"""An adapter without its base: a folder that plain peft loads, and the model again from it."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ftune import rundir
from ftune.adapters.rounding import tell
from ftune.errors import Problem, RecipeError
from ftune.models.finished import ADAPTER
from ftune.weights.files import NAMES, tensors_of
from ftune.weights.shards import in_range
from ftune.weights.source import Source
from ftune.weights.written import write_tokenizer

WEIGHTS = "adapter_model.safetensors"


def check(source: Source) -> None:
    """Refuse a run without an adapter."""
    if not source.has_adapter:
        what = f"the run `{source.run_directory}` has no adapter"
        why, fix = "it trained the weights themselves", "export it with --format safetensors"
        raise RecipeError(Problem("not-an-adapter", what, why=why, fix=fix))


def write(source: Source, folder: Path, dtype: str) -> None:
    """Write the adapter in a type, with what says how and on what it was trained."""
    stored = tensors_of(source.found.folder / WEIGHTS)
    save_file({name: in_range(value, name, NAMES[dtype]) for name, value in stored.items()}, folder / WEIGHTS)
    for name in (ADAPTER, rundir.BASE_FINGERPRINT):
        if (source.found.folder / name).is_file():
            shutil.copyfile(source.found.folder / name, folder / name)
    if source.found.fits_rounded_base and source.found.quantization is not None:
        tell(folder, source.name, source.found.quantization)
    write_tokenizer(source, folder)


def computing(source: Source, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
    """Return a context with the base and the written adapter on it."""
    return source.with_result(replace(source.found, folder=folder)).computing()
