"""ftune: fine-tune language models from one YAML recipe, on the GPU you have.

`import ftune` costs milliseconds: `ftune.check`, `ftune.plan` and `ftune.train` are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftune.api import check, plan, train

__version__ = "0.1.0"
__all__ = ["__version__", "check", "plan", "train"]


def __getattr__(name: str) -> Any:
    if name in ("check", "plan", "train"):
        return getattr(importlib.import_module("ftune.api"), name)
    raise AttributeError(f"module 'ftune' has no attribute {name!r}")
