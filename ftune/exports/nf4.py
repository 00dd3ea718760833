"""The whole model in 4 bits by bitsandbytes, an adapter folded in first: rounded once, and it says what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ftune.plugin import Export, Tolerance


class NF4(Export):
    name = "nf4"
    summary = "The whole model in 4 bits (NF4, double quantisation), rounded after an adapter was folded in."
    needs = ("bitsandbytes",)
    read_by = "plain transformers with bitsandbytes"
    # Three times what SmolLM2-135M shows (0.8), which loses far more than large models do.
    tolerances: Mapping[str, Tolerance] = dict.fromkeys(("float32", "bfloat16", "float16"), Tolerance("mean KL", 2.5))
    refuses = "adapters on a base that is itself stored in fewer bits"

    def check(self, source: Any) -> None:
        source.require_plain_weights()

    def write(self, source: Any, folder: Path, *, dtype: str, max_shard_size: str) -> None:
        from ftune.weights import rounded

        rounded.write(source, folder, dtype, max_shard_size)

    def computing(self, source: Any, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
        from ftune.weights import written

        return written.loaded(source, folder)


plugin = NF4()
