"""Padding, told by hand."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers.masking_utils import find_packed_sequence_indices

from ftune.data.collate import Collator, padding_id

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


@pytest.mark.parametrize("by_source", [False, True])
def test_each_text_of_a_row_is_padded_by_itself(by_source: bool) -> None:
    rows = [
        {
            "source": 0,
            "chosen_input_ids": [5, 6, 2],
            "chosen_labels": [-100, 6, 2],
            "rejected_input_ids": [5],
            "rejected_labels": [-100],
        },
        {
            "source": 1,
            "chosen_input_ids": [7],
            "chosen_labels": [7],
            "rejected_input_ids": [8, 9],
            "rejected_labels": [-100, 9],
        },
    ]
    batch = Collator(pad_token_id=2, by_source=by_source)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "chosen_input_ids": [[5, 6, 2], [7, 2, 2]],
        "chosen_labels": [[-100, 6, 2], [7, -100, -100]],
        "chosen_attention_mask": [[1, 1, 1], [1, 0, 0]],
        "rejected_input_ids": [[5, 2], [8, 9]],
        "rejected_labels": [[-100, -100], [-100, 9]],
        "rejected_attention_mask": [[1, 0], [1, 1]],
    }


def test_the_source_of_each_token_is_told_where_it_is_wanted() -> None:
    alone = [{**row, "source": number} for number, row in zip((3, 1), ROWS, strict=True)]
    assert "source" not in Collator(pad_token_id=2)(alone)
    # Padding is nobody's, but must be a number that there is a place for.
    assert Collator(pad_token_id=2, by_source=True)(alone)["source"].tolist() == [[3, 3, 3], [1, 0, 0]]
    for kind in (list, numpy.array):
        packed = [{**PACKED[0], "source": kind([2, 2, 1, 1])}, {**PACKED[1], "source": kind([3])}]
        assert Collator(pad_token_id=2, by_source=True)(packed)["source"].tolist() == [[2, 2, 1, 1], [3, 0, 0, 0]]
        flat = Collator(pad_token_id=2, flatten=True, by_source=True)(packed)
        assert flat["source"].tolist() == [[2, 2, 1, 1, 3]]
        assert {tensor.dtype for tensor in flat.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("pad", "end", "rows", "expected"),
    [(7, 5, 8, 7), (7, 5, 7, 5), (7, 5, 5, 0), (None, 5, 6, 5), (None, None, 6, 0), (0, 5, 6, 0)],
)
def test_padding_has_an_embedding(pad: int | None, end: int | None, rows: int, expected: int) -> None:
    assert padding_id(SimpleNamespace(pad_token_id=pad, eos_token_id=end), rows) == expected
