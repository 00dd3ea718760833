"""Tokenised rows in Arrow files, found again by what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.arrow_writer import ArrowWriter

from ftune import rundir
from ftune.data.rows import files_of, is_local
from ftune.data.tokenize import Encoded
from ftune.digest import sha256_of

LAYOUT = 1
"""Raised whenever the same rows would come out as other tokens or columns; older files are then made anew."""

COLUMNS = ("input_ids", "labels")
PACKED_COLUMNS = (*COLUMNS, "position_ids")


def features(columns: Iterable[str]) -> datasets.Features:
    # 32 bits hold any vocabulary and half the disk; the collator widens them.
    return datasets.Features({column: datasets.Sequence(datasets.Value("int32")) for column in columns})


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
        digest.update(f"{path.suffixes[-2:]} {path.stat().st_size}\n".encode())
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def key_of(*facts: Any) -> str:
    return hashlib.sha256(json.dumps([LAYOUT, *facts], sort_keys=True).encode()).hexdigest()[:32]


def find(directory: Path, key: str) -> tuple[datasets.Dataset, dict[str, Any]] | None:
    """Return a stored data set with its notes, if it is there whole."""
    try:
        notes = json.loads((directory / f"{key}.json").read_text(encoding="utf-8"))
        found = datasets.Dataset.from_file(str(directory / f"{key}.arrow"))
    except (OSError, ValueError, pyarrow.ArrowInvalid):
        return None
    return found, notes


def write(
    directory: Path | None, key: str, columns: tuple[str, ...], batches: Iterable[dict[str, list[Any]]]
) -> datasets.Dataset:
    """Write batches of columns to an Arrow file that is there whole or not at all; to memory without a directory."""
    if directory is None:
        buffer = pyarrow.BufferOutputStream()
        _fill(ArrowWriter(features=features(columns), stream=buffer), batches)
        return datasets.Dataset.from_buffer(buffer.getvalue())
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"{key}.arrow"
    # Several ranks may write the same file at once: each its own, and the last rename wins.
    partial = directory / f"{key}.{os.getpid()}{rundir.PARTIAL_SUFFIX}"
    try:
        _fill(ArrowWriter(features=features(columns), path=str(partial)), batches)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(final))


def writable(directory: Path | None) -> Path | None:
    """Return the folder if files can be made in it; None where rows must stay in memory."""
    if directory is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory if os.access(directory, os.W_OK | os.X_OK) else None


def write_notes(directory: Path | None, key: str, notes: dict[str, Any]) -> None:
    """Write what is known about a stored data set; being last, it says that the data set is complete."""
    if directory is not None:
        rundir.write_text(directory / f"{key}.json", json.dumps(notes, indent=1))


def _fill(writer: ArrowWriter, batches: Iterable[dict[str, list[Any]]]) -> None:
    try:
        for batch in batches:
            writer.write_batch(batch)
        writer.finalize()
    finally:
        writer.close()


def as_columns(rows: list[Encoded]) -> dict[str, list[Any]]:
    return {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
