"""What happens to an error that is ours: a saved report, and where it lies."""

from __future__ import annotations

import platform
import sys
import tempfile
import traceback
from pathlib import Path


def report(text: str = "") -> int:
    """Save a traceback, by default the current one, with what is needed to reproduce it; returns exit code 1."""
    from ftune import __version__
    from ftune.machine import probe

    text = text or traceback.format_exc()
    packages = probe().packages
    names = ("torch", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "typer", "pydantic")
    lines = [
        f"ftune {__version__}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join(f"{name} {packages[name]}" for name in names if name in packages),
        "command: " + " ".join(sys.argv),
        "",
        text,
    ]
    # An argument that is not UTF-8 reaches Python as half surrogate pairs, which no file takes as they are.
    written = "\n".join(lines).encode("utf-8", "backslashreplace")
    with tempfile.NamedTemporaryFile("wb", prefix="ftune-crash-", suffix=".txt", delete=False) as file:
        file.write(written)
    print(text.strip().splitlines()[-1], file=sys.stderr)
    print(f"this is a bug in ftune; please send us {Path(file.name)}", file=sys.stderr)
    return 1
