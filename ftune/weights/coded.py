"""A run's adapter folded into the codes of its base, for formats that keep them: exact, and no code changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.adapters.pooled import fold_pooled
from ftune.errors import Problem, RecipeError
from ftune.quantized.linear import QuantizedLinear
from ftune.weights.files import NAMES
from ftune.weights.source import Source
from ftune.weights.written import write_tokenizer


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


def write(source: Source, folder: Path, dtype: str, save: Callable[[Any, Path], None]) -> None:
    """Write the merged model with `save`; weights that are no codes in `dtype`, scales and offsets as they are."""
    model = fold_pooled(source.taken(), over=QuantizedLinear)
    for weight in model.parameters():
        weight.data = weight.data.to(NAMES[dtype])
    model.config.dtype = NAMES[dtype]
    save(model, folder)
    write_tokenizer(source, folder)
