"""Which models are codes on the disk already, told by their files without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftune.errors import RunError
from ftune.tensor_files import stored_in_file

OWN, GPTQ, HQQ = "ftune", "gptq", "hqq"
"""What config.json calls the quantisations whose codes ftune reads itself, its own first."""


def kind_of_codes(folder: Path, settings: Any) -> str | None:
    """Return which codes a model's folder holds; None where they are weights, or of a kind that transformers reads.

    `settings` is the quantization_config of its config.json, or None. The hqq package leaves it out: there the names
    of the tensors tell.
    """
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        return method if method in (OWN, GPTQ, HQQ) else None
    return HQQ if any(name.endswith(".W_q") for name in _tensor_names(folder)) else None


def _tensor_names(folder: Path) -> Iterator[str]:
    """Yield the names in the headers of a folder's safetensors; what cannot be read is left to whoever loads it."""
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(RunError):
            yield from stored_in_file(path)
