"""Rows of unequal length to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftune.losses import IGNORED

SOURCE = "source"
"""Which source a row came from; of packed rows one number for each token."""


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
    by_source: bool = False
    """Say which source each token came from, so that losses can be told apart."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        names = [name.removesuffix("input_ids") for name in rows[0] if name.endswith("input_ids")]
        batch: dict[str, torch.Tensor] = {}
        for view in names:
            batch |= self._view(rows, view)
        return batch

    def _view(self, rows: Sequence[Mapping[str, Any]], view: str) -> dict[str, torch.Tensor]:
        ids, labels = f"{view}input_ids", f"{view}labels"
        if self.flatten and "position_ids" in rows[0]:
            return self._flat(rows)
        longest = max(len(row[ids]) for row in rows)
        batch = {
            ids: _stacked([row[ids] for row in rows], longest, self.pad_token_id),
            labels: _stacked([row[labels] for row in rows], longest, IGNORED),
        }
        if self.by_source and not view:
            batch[SOURCE] = _stacked([_spread(row, ids) for row in rows], longest, 0)
        if "position_ids" in rows[0]:
            # No attention mask: an all-ones one would silently bring back attention between the packed rows, since
            # transformers looks for restarting positions only where no mask is given (masking_utils, 5.23).
            batch["position_ids"] = _positions(rows, longest)
            return batch
        batch[f"{view}attention_mask"] = mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for at, row in enumerate(rows):
            mask[at, : len(row[ids])] = 1
        return batch

    def _flat(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the rows one after another, which needs no padding; positions restart where a row begins."""
        columns = ["input_ids", "labels", "position_ids", *([SOURCE] if self.by_source else [])]
        return {name: torch.cat([torch.as_tensor(row[name]).long() for row in rows])[None] for name in columns}


def _spread(row: Mapping[str, Any], ids: str) -> Any:
    source = row[SOURCE]
    return torch.full((len(row[ids]),), source) if isinstance(source, int) else source


def _stacked(rows: Sequence[Any], longest: int, padding: int) -> torch.Tensor:
    stacked = torch.full((len(rows), longest), padding, dtype=torch.int64)
    for at, row in enumerate(rows):
        stacked[at, : len(row)] = torch.as_tensor(row)
    return stacked


def _positions(rows: Sequence[Mapping[str, Any]], longest: int) -> torch.Tensor:
    """Return the rows' positions; the padding counts from 0 and is thereby a document of its own."""
    positions = torch.empty(len(rows), longest, dtype=torch.int64)
    for at, row in enumerate(rows):
        length = len(row["position_ids"])
        positions[at, :length] = torch.as_tensor(row["position_ids"])
        positions[at, length:] = torch.arange(longest - length)
    return positions
