"""GPUs by name and by size."""

from __future__ import annotations

import json
from importlib import resources
from itertools import pairwise

import pytest

from ftune.errors import RecipeError
from ftune.machine import Gpu
from ftune.memory.gpus import find_gpu, known_gpus, of_this_machine

GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        ("RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("nvidia-geforce-rtx-4090", "NVIDIA GeForce RTX 4090"),
        ("4070 ti super", "NVIDIA GeForce RTX 4070 Ti SUPER"),
        ("A100-80GB", "NVIDIA A100-SXM4-80GB"),
        ("a100-80gib", "NVIDIA A100-SXM4-80GB"),
        ("A100 40GB", "NVIDIA A100-SXM4-40GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 80GB PCIe"),
        ("h100 pcie", "NVIDIA H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("a10", "NVIDIA A10"),
        ("A10G", "NVIDIA A10G"),
        ("l4", "NVIDIA L4"),
        ("L40S", "NVIDIA L40S"),
        ("t4", "Tesla T4"),
        ("V100-32GB", "Tesla V100-SXM2-32GB"),
        ("A6000", "NVIDIA RTX A6000"),
        ("rtx 6000 ada", "NVIDIA RTX 6000 Ada Generation"),
        ("rtx pro 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
        ("mi300x", "AMD Instinct MI300X"),
    ],
)
def test_a_name(text: str, name: str) -> None:
    gpu = find_gpu(text)
    assert (gpu.name, gpu.assumed) == (name, "")
    assert gpu.has_speed


@pytest.mark.parametrize(
    ("text", "taken", "other"),
    [
        ("a100", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"),
        ("H100", "NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL"),
        ("3080", "NVIDIA GeForce RTX 3080", "NVIDIA GeForce RTX 3080 12GB"),
        ("4060 ti", "NVIDIA GeForce RTX 4060 Ti", "NVIDIA GeForce RTX 4060 Ti 16GB"),
    ],
)
def test_a_family_is_taken_for_its_usual_member_and_says_so(text: str, taken: str, other: str) -> None:
    gpu = find_gpu(text)
    assert gpu.name == taken
    assert other in gpu.assumed
    assert "SUPER" not in gpu.assumed


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("v100", "Tesla V100-SXM2-16GB"),
        ("5060", "NVIDIA GeForce RTX 5060 Ti"),
        ("rtx", "NVIDIA GeForce RTX 3060"),
        ("a1000", "NVIDIA A100-SXM4-80GB"),
        ("407", "NVIDIA GeForce RTX 4070"),
        ("rtx 4090 laptop", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_a_name_that_is_not_clear(text: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_gpu(text)
    (problem,) = caught.value.problems
    assert near in problem.fix
    assert "--gpu 24GiB always works" in problem.fix


@pytest.mark.parametrize("text", ["", "-", "nvidia", "0GB", "toaster"])
def test_no_name_at_all(text: str) -> None:
    with pytest.raises(RecipeError, match="--gpu 24GiB always works"):
        find_gpu(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), (" 24 gib ", 24 * GIB), ("1.5TiB", 1536 * GIB), ("512MiB", GIB // 2)],
)
def test_a_size_is_a_gpu_without_speed(text: str, size: int) -> None:
    gpu = find_gpu(text)
    assert (gpu.memory_bytes, gpu.has_speed) == (size, False)


def test_the_gpu_of_this_machine() -> None:
    known = of_this_machine(Gpu("NVIDIA H100 80GB HBM3", 81559 * 1024**2, (9, 0)))
    assert known.memory_bytes == find_gpu("h100").memory_bytes
    assert known.peak_flops("bfloat16") == 989.4e12
    part = of_this_machine(Gpu("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20 * GIB, (8, 0)))
    assert 19 * GIB < part.memory_bytes < 20 * GIB
    assert not part.has_speed
    smaller = of_this_machine(Gpu("NVIDIA GeForce RTX 4090", 20 * GIB, (8, 9)))
    assert smaller.memory_bytes == 20 * GIB


def test_every_row_of_the_table() -> None:
    rows = json.loads(resources.files("ftune.memory").joinpath("gpus.json").read_text(encoding="utf-8"))
    assert len(rows) == len(known_gpus()) >= 50
    names = [name for row in rows for name in (row["name"], *row["aliases"])]
    assert len({name.lower() for name in names}) == len(names)
    for row, gpu in zip(rows, known_gpus(), strict=True):
        for name in (row["name"], *row["aliases"]):
            assert find_gpu(name).name == row["name"]
        assert row["source"]
        assert 0.9 < gpu.memory_bytes / GIB / row["memory_gib"] <= 1
        flops = row["tflops"]
        # Narrower numbers are not slower; the widest step is from B200's plain units to its tensor cores.
        rates = [flops[dtype] for dtype in ("float32", "tf32", "float16", "float8") if dtype in flops]
        assert rates == sorted(rates)
        assert all(above <= 15 * below for below, above in pairwise(rates))
        assert ("bfloat16" in flops) == (gpu.capability >= (8, 0))
        assert ("float8" in flops) == (gpu.capability >= (8, 9))
        assert gpu.peak_flops("bfloat16") > 0
