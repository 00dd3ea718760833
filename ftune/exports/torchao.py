"""A merged QA-LoRA model in the bits it was trained upon, as plain transformers reads it through torchao."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ftune.plugin import Export
from ftune.weights.tolerances import FLOATS, ROUNDED


class TorchAO(Export):
    name = "torchao"
    summary = "The merged model in 2 to 8 bits with floating zero-points, each code in a byte: exact."
    needs = ("torchao",)
    read_by = "plain transformers with torchao"
    tolerances = FLOATS
    rounds = ROUNDED
    shards = True
    refuses = "runs of other methods than qalora, and groups whose inputs are not neighbours"

    def bytes_needed(self, source: Any, dtype: str) -> int:
        from ftune.weights import coded

        return coded.bytes_needed(source, dtype) + source.parameters  # codes are a byte each here

    def check(self, source: Any) -> None:
        from ftune.weights import coded

        coded.check(source)

    def write(self, source: Any, folder: Path, *, dtype: str, max_shard_size: str) -> None:
        from ftune.quantized.saved import save_torchao
        from ftune.weights import coded

        coded.write(source, folder, dtype, max_shard_size, save_torchao)

    def check_rounding(self, source: Any, folder: Path, model: Any, *, dtype: str) -> None:
        from ftune.weights import coded

        coded.check_rounding(source, model, dtype)

    def computing(self, source: Any, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
        from ftune.weights import coded

        return coded.loaded_as_float32(source, folder)


plugin = TorchAO()
