"""A merged QA-LoRA model in the bits it was trained upon, as ftune itself reads it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ftune.plugin import Export
from ftune.weights.tolerances import FLOATS, ROUNDED


class LowBit(Export):
    name = "low_bit"
    summary = "The merged model in 2 to 8 bits, codes packed: the smallest form, exact."
    read_by = "ftune: to talk to, to train on, to export again"
    tolerances = FLOATS
    rounds = ROUNDED
    shards = True
    refuses = "runs of other methods than qalora"

    def bytes_needed(self, source: Any, dtype: str) -> int:
        from ftune.weights import coded

        return coded.bytes_needed(source, dtype)

    def check(self, source: Any) -> None:
        from ftune.weights import coded

        coded.check(source)

    def write(self, source: Any, folder: Path, *, dtype: str, max_shard_size: str) -> None:
        from ftune.quantized.saved import save_quantized
        from ftune.weights import coded

        coded.write(source, folder, dtype, max_shard_size, save_quantized)

    def check_rounding(self, source: Any, folder: Path, model: Any, *, dtype: str) -> None:
        from ftune.weights import coded

        coded.check_rounding(source, model, dtype)

    def computing(self, source: Any, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
        from ftune.weights import written

        return written.loaded(source, folder)


plugin = LowBit()
