"""The whole model in 4 bits by bitsandbytes, an adapter folded in first: rounded once, and it says what that costs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ftune.plugin import Export
from ftune.weights.tolerances import FLOATS


class NF4(Export):
    name = "nf4"
    summary = "The whole model in 4 bits (NF4, double quantisation), rounded after an adapter was folded in."
    needs = ("bitsandbytes",)
    read_by = "plain transformers with bitsandbytes"
    # What 4 bits cost depends on the model: SmolLM2-135M shows a mean KL of 0.8, and no limit would fit others.
    tolerances = dict.fromkeys(FLOATS)
    rounds = frozenset(FLOATS)
    shards = True
    refuses = "adapters on a base that is itself stored in fewer bits"

    def check(self, source: Any) -> None:
        source.require_plain_weights()

    def write(self, source: Any, folder: Path, *, dtype: str, max_shard_size: str) -> None:
        from ftune.weights import rounded

        rounded.write(source, folder, dtype, max_shard_size)

    def check_rounding(self, source: Any, folder: Path, model: Any, *, dtype: str) -> None:
        from ftune.weights import rounded

        rounded.check_rounding(source, model, dtype)

    def computing(self, source: Any, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
        from ftune.weights import written

        return written.loaded(source, folder)


plugin = NF4()
