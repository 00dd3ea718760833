"""What stored tokens were made from: the name under which they are found again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ftune.cache import content_hash
from ftune.data.rows import files_of, is_local

LAYOUT = 4
"""Raised whenever the same rows would come out as other tokens, columns or notes; older files are then made anew."""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a digest of everything that decides how text becomes tokens."""
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left over from whatever the tokenizer was last used for.
    form.pop("truncation", None)
    form.pop("padding", None)
    parts = [form, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def source_fingerprint(source: str, split: str) -> str | None:
    """Return a digest of a source's contents; None for a hub data set whose commit is unknown."""
    if not is_local(source):
        from ftune.data.hub import revision

        commit = revision(source)
        return commit and f"{source}@{commit}/{split}"
    digest = hashlib.sha256()
    for path in files_of(source):
        # The ending decides how the bytes are read.
        digest.update(f"{path.suffixes[-2:]} {path.stat().st_size} {content_hash(path)}\n".encode())
    return digest.hexdigest()


def key_of(*facts: Any) -> str:
    return hashlib.sha256(json.dumps([LAYOUT, *facts], sort_keys=True).encode()).hexdigest()[:32]


def writable(directory: Path | None) -> Path | None:
    """Return the folder if files can be made in it; None where rows must stay in memory."""
    if directory is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory if os.access(directory, os.W_OK | os.X_OK) else None
