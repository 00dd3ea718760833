"""The adapter by itself, for those who have its base."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ftune.plugin import Export
from ftune.weights.tolerances import FLOATS


class Adapter(Export):
    name = "adapter"
    summary = "The adapter alone, a few megabytes beside its base."
    read_by = "plain peft, on the same base"
    tolerances = FLOATS
    refuses = "runs that trained the weights themselves"

    def default_dtype(self, source: Any) -> str:
        from ftune.weights.files import stored_dtype

        return stored_dtype(source.found.folder, {})

    def bytes_needed(self, source: Any, dtype: str) -> int:
        return 2 * sum(path.stat().st_size for path in source.found.folder.iterdir())

    def check(self, source: Any) -> None:
        from ftune.weights import alone

        alone.check(source)

    def write(self, source: Any, folder: Path, *, dtype: str, max_shard_size: str) -> None:
        from ftune.weights import alone

        alone.write(source, folder, dtype)

    def computing(self, source: Any, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
        from ftune.weights import alone

        return alone.computing(source, folder)


plugin = Adapter()
