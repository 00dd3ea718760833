"""Rows of unequal length to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftune.data.tokenize import IGNORED


def padding_id(tokenizer: Any, rows: int) -> int:
    """Return what to pad with: an id that the model has an embedding for, as padding is looked up though masked."""
    wanted = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((number for number in wanted if number is not None and number < rows), 0)


@dataclass(frozen=True)
class Collator:
    """Pads on the right. Labels are masked by place, never by id: a pad token may be the end-of-turn token too."""

    pad_token_id: int
    flatten: bool = False
    """Join packed rows into one long row, for FlashAttention: transformers 5.23 (`_is_packed_sequence`) keeps documents
    apart there only at batch size 1, and says nothing otherwise."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if self.flatten and "position_ids" in rows[0]:
            return _flat(rows)
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": _stacked(rows, "input_ids", longest, self.pad_token_id),
            "labels": _stacked(rows, "labels", longest, IGNORED),
        }
        if "position_ids" in rows[0]:
            # No attention mask: an all-ones one would silently bring back attention between the packed rows, since
            # transformers looks for restarting positions only where no mask is given (masking_utils, 5.23).
            batch["position_ids"] = _positions(rows, longest)
            return batch
        batch["attention_mask"] = torch.zeros(len(rows), longest, dtype=torch.int64)
        for at, row in enumerate(rows):
            batch["attention_mask"][at, : len(row["input_ids"])] = 1
        return batch


def _flat(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the rows one after another, which needs no padding; positions restart where a row begins."""
    columns = ("input_ids", "labels", "position_ids")
    return {
        column: torch.cat([torch.as_tensor(row[column], dtype=torch.int64) for row in rows])[None] for column in columns
    }


def _stacked(rows: Sequence[Mapping[str, Any]], column: str, longest: int, padding: int) -> torch.Tensor:
    stacked = torch.full((len(rows), longest), padding, dtype=torch.int64)
    for at, row in enumerate(rows):
        stacked[at, : len(row[column])] = torch.as_tensor(row[column], dtype=torch.int64)
    return stacked


def _positions(rows: Sequence[Mapping[str, Any]], longest: int) -> torch.Tensor:
    """Return the rows' positions; the padding counts from 0 and is thereby a document of its own."""
    positions = torch.empty(len(rows), longest, dtype=torch.int64)
    for at, row in enumerate(rows):
        length = len(row["position_ids"])
        positions[at, :length] = torch.as_tensor(row["position_ids"], dtype=torch.int64)
        positions[at, length:] = torch.arange(longest - length)
    return positions
