"""Whole weights as safetensors, which transformers and most servers load."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ftune.plugin import Export
from ftune.weights.tolerances import FLOATS, ROUNDED


class Safetensors(Export):
    name = "safetensors"
    summary = "The whole model as safetensors, in shards, an adapter folded in."
    read_by = "plain transformers, vLLM, SGLang and others"
    tolerances = FLOATS
    rounds = ROUNDED
    shards = True
    refuses = "adapters on a base that is itself stored in fewer bits"

    def check(self, source: Any) -> None:
        source.require_plain_weights()

    def write(self, source: Any, folder: Path, *, dtype: str, max_shard_size: str) -> None:
        from ftune.weights import written

        written.write(source, folder, dtype, max_shard_size)

    def check_rounding(self, source: Any, folder: Path, model: Any, *, dtype: str) -> None:
        from ftune.weights import written

        written.check_rounding(source, folder, model, dtype)

    def computing(self, source: Any, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
        from ftune.weights import written

        return written.computing(source, folder)


plugin = Safetensors()
