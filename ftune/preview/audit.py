"""The audit of whole sets as one JSON-able object: counts, findings, lengths, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from ftune.data.lengths import length_summary, padding_of
from ftune.data.overview import set_findings
from ftune.data.prepare import LOOKED_AT, Prepared, Stored
from ftune.recipe.schema import Recipe

_COUNTS = ("rows", "left_out", "tokens", "supervised_tokens", "cut_tokens")


def audit_of(prepared: Prepared, recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """Return what is known of all rows of each part, and what is to be said of the tokenizer."""
    audit = {name: _part(name, stored, prepared, recipe) for name, stored in prepared.seen.items()}
    return {**audit, "notes": list(_notes(prepared, tokenizer))}


def _part(name: str, stored: Sequence[Stored], prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    ignored = recipe.data.audit_ignore
    found = [{**one.as_dict(), "source": each.part.source} for each in stored for one in each.found(ignored)]
    copied = set_findings(prepared.seen, prepared.copies, name, ignored)
    found += [{**one.as_dict(), "source": None} for one in copied]
    lengths = numpy.concatenate([each.file.lengths() for each in stored])
    return {
        **{count: sum(getattr(each.audit, count) for each in stored) for count in _COUNTS},
        "longest": max(each.audit.longest for each in stored),
        "sources": [
            {"source": each.part.source, "format": each.encoding.format.name, "rows": each.audit.rows}
            for each in stored
        ],
        "findings": found,
        "lengths": length_summary(lengths),
        "padding": padding_of(stored, recipe.data, recipe.training) if name == "train" else {},
    }


def _notes(prepared: Prepared, tokenizer: Any) -> list[str]:
    notes = []
    if prepared.first_rows:
        notes.append(f"training rows are streamed: the first {LOOKED_AT:,} of each source were looked at")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        notes.append(
            f"the padding token is also the end token, `{tokenizer.eos_token}`: padding is left out of the loss by its "
            "place, so the end is learned"
        )
    return notes
