"""Padding, told by hand."""

from __future__ import annotations

import pickle

import torch
from transformers.masking_utils import find_packed_sequence_indices

from ftune.data.collate import Collator

ROWS = [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [7], "labels": [-100]}]
PACKED = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]},
    {"input_ids": [9], "labels": [-100], "position_ids": [0]},
]


def test_padding_is_masked_by_place_and_an_end_mark_of_the_same_id_is_not() -> None:
    batch = Collator(pad_token_id=2)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_packed_rows_have_no_mask_and_padding_is_a_document_of_its_own() -> None:
    batch = Collator(pad_token_id=2)(PACKED)
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100] * 4]
    documents = find_packed_sequence_indices(batch["position_ids"])
    assert documents is not None
    assert documents.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]


def test_flattened_rows_need_no_padding() -> None:
    batch = Collator(pad_token_id=2, flatten=True)(PACKED)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]


def test_it_travels_to_worker_processes() -> None:
    collator = pickle.loads(pickle.dumps(Collator(pad_token_id=2)))
    assert collator == Collator(pad_token_id=2)
