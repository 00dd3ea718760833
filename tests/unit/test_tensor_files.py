"""Headers of safetensors files, beside what their own library reads of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from ftune import tensor_files
from ftune.errors import RunError

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a.weight": torch.arange(5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4, dtype=torch.int64),
    "number": torch.tensor(7, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "eighths": torch.arange(4).to(torch.float8_e4m3fn),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def test_what_the_library_reads(path: Path) -> None:
    whole = path.read_bytes()
    found = tensor_files.stored_in(path.parent)
    assert found == tensor_files.stored_in_file(path)
    with safe_open(path, framework="pt") as opened:
        assert set(found) == set(opened.keys())
        for name, stored in found.items():
            part = opened.get_slice(name)
            assert (stored.dtype, list(stored.shape)) == (part.get_dtype(), part.get_shape())
            # The bytes alone, under a header of their own, are the same tensor.
            length = stored.end - stored.begin
            header = {"x": {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [0, length]}}
            text = json.dumps(header).encode()
            alone = load(struct.pack("<Q", len(text)) + text + whole[stored.begin : stored.end])["x"]
            assert torch.equal(alone.float(), TENSORS[name].float())


@pytest.mark.parametrize("kept", [0, 3, 8, 60, -1])
def test_files_cut_short(kept: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    refused_by_both(path)


def damage_header(path: Path, key: str, value: object) -> None:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["b.weight"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("key", "value"),
    [("shape", [2, 4]), ("shape", "wide"), ("data_offsets", [0, 10**6]), ("data_offsets", [-8, 16]), ("dtype", None)],
)
def test_headers_that_cannot_be(key: str, value: object, path: Path) -> None:
    damage_header(path, key, value)
    refused_by_both(path)


def test_what_is_no_file_of_tensors(path: Path) -> None:
    for content in (b"not tensors at all", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2**63) + b"{}"):
        path.write_bytes(content)
        refused_by_both(path)


def refused_by_both(path: Path) -> None:
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass
    with pytest.raises(RunError) as caught:
        tensor_files.stored_in_file(path)
    assert caught.value.problems[0].rule == "weights-damaged"
    assert caught.value.problems[0].why


def test_only_the_files_that_the_index_names(path: Path) -> None:
    save_file({"other": torch.ones(1)}, path.with_name("consolidated.safetensors"))
    assert "other" not in tensor_files.stored_in(path.parent)
    path.rename(path.with_name("model-00001-of-00001.safetensors"))
    index = {"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    assert set(tensor_files.stored_in(path.parent)) == set(TENSORS)
