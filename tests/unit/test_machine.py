from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftune import machine
from ftune.errors import MachineError
from ftune.machine import Gpu, Machine, installed, parse_gpus, probe
from ftune.recipe import load
from ftune.resolve import examine, raise_errors
from ftune.rules import check

TABLE = """\
0, GPU-aaaa, NVIDIA A100-SXM4-80GB, 81920, 8.0
1, GPU-bbbb, NVIDIA GeForce GTX 1080, 8192, 6.1
"""
A100 = Gpu("NVIDIA A100-SXM4-80GB", 80 * 1024**3, (8, 0))
GTX = Gpu("NVIDIA GeForce GTX 1080", 8 * 1024**3, (6, 1))
LISTING = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaaa)
  MIG 1g.10gb     Device  0: (UUID: MIG-1111-a)
  MIG 1c.2g.20gb+me Device  1: (UUID: MIG-2222-b)
  MIG 3g.40gb     Device  2: (UUID: MIG-GPU-aaaa/1/0)
GPU 1: NVIDIA GeForce GTX 1080 (UUID: GPU-bbbb)
"""
SLICE = Gpu("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 10 * 1024**3, (8, 0))
LARGER_SLICE = Gpu("NVIDIA A100-SXM4-80GB MIG 1c.2g.20gb+me", 20 * 1024**3, (8, 0))
OLD_SLICE = Gpu("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40 * 1024**3, (8, 0))


@pytest.mark.parametrize(
    ("visible", "gpus", "unknown"),
    [
        (None, (A100, GTX), ""),
        ("0,1", (A100, GTX), ""),
        ("1,0", (GTX, A100), ""),
        (" 1 ", (GTX,), ""),
        ("GPU-bb", (GTX,), ""),
        ("0,7,1", (A100,), "7"),
        ("-1", (), ""),
        ("NoDevFiles", (), ""),
        ("MIG-1111", (SLICE,), ""),
        ("MIG-2222-b,MIG-1111", (LARGER_SLICE,), ""),
        ("MIG-GPU-aaaa/1/0", (OLD_SLICE,), ""),
        ("MIG-3333", (), "MIG-3333"),
        ("1,MIG-1111", (GTX,), "MIG-1111"),
    ],
)
def test_visible_devices_choose_as_cuda_does(visible: str | None, gpus: tuple[Gpu, ...], unknown: str) -> None:
    assert parse_gpus(TABLE, visible, LISTING) == (gpus, unknown)


def test_shared_memory_and_nonsense_lines() -> None:
    found, _ = parse_gpus("warning: x\n0, GPU-1, NVIDIA GB10, [N/A], 12.1\n", None)
    assert found == (Gpu("NVIDIA GB10", machine.memory_bytes(), (12, 1)),)


def fake_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_probe_asks_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake_smi(tmp_path, f"echo '{TABLE.splitlines()[0]}'")
    assert probe().gpus == (A100,)
    assert probe().device_type == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert probe().gpus == ()
    assert probe().device_type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    fake_smi(tmp_path, "echo 'has failed because it could not communicate with the driver'; exit 9")
    assert probe().gpus == ()


def test_probe_asks_for_the_parts_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    fake_smi(tmp_path, f"if [ $1 = -L ]; then echo '{LISTING}'; else echo '{TABLE}'; fi")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1111-a")
    assert (probe().gpus, probe().unknown_device) == ((SLICE,), "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-of-yesterday")
    assert (probe().gpus, probe().unknown_device) == ((), "MIG-of-yesterday")
    loaded = load({"model": {"model_name_or_path": "m"}, "data": {"train": "t"}, "training": {"output_dir": "o"}})
    (problem,) = check(loaded, probe())
    assert problem.severity == "warning"
    assert "names `MIG-of-yesterday`" in problem.what
    assert "what is left is the processor" in problem.why


def test_a_pytorch_for_cpus_beside_a_gpu_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake_smi(tmp_path, f"echo '{TABLE.splitlines()[0]}'")
    (tmp_path / "torch-2.13.0+cpu.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = {"model": {"model_name_or_path": "m"}, "data": {"train": "t"}, "training": {"output_dir": "o"}}
    with pytest.raises(MachineError) as caught:
        raise_errors(examine(recipe, (), probe())[1])
    (problem,) = caught.value.problems
    assert "torch 2.13.0+cpu is built for CPUs alone" in problem.why
    assert "pip install --force-reinstall torch==2.13.0;" in problem.fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert examine(recipe, (), probe())[1] == []


def test_a_hanging_driver_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_TIMEOUT_SECONDS", 0.2)
    fake_smi(tmp_path, "exec sleep 30")
    begin = time.perf_counter()
    assert probe().gpus == ()
    assert time.perf_counter() - begin < 10


def test_packages_are_found_by_import_name(tmp_path: Path) -> None:
    names = ["flash_attn-2.8.1.dist-info", "flash_attn_3-3.0.0.dist-info", "PyYAML-6.0.dist-info"]
    for name in (*names, "Old.Thing-1.0-py3.11.egg-info", "README"):
        (tmp_path / name).mkdir()
    found = installed([str(tmp_path), str(tmp_path / "missing")])
    assert found == {"flash_attn": "2.8.1", "flash_attn_interface": "3.0.0", "yaml": "6.0", "old_thing": "1.0"}
    here = Machine(packages=found)
    assert here.has("flash_attn")
    assert here.has("yaml")
    assert not here.has("flash")


def test_versions_are_those_of_importlib_metadata() -> None:
    import importlib.metadata

    found = probe().packages
    for name in ("torch", "transformers", "peft", "typer", "pytest"):
        assert found[name] == importlib.metadata.version(name)


@pytest.mark.parametrize(
    ("here", "quick"),
    [
        (Machine(cpu_flags=frozenset({"avx512_bf16"})), True),
        (Machine(cpu_flags=frozenset({"avx2"})), False),
        (Machine(gpus=(A100,)), True),
        (Machine(gpus=(A100, GTX)), False),
    ],
)
def test_bfloat16(here: Machine, quick: bool) -> None:
    assert here.computes_bfloat16() is quick


def test_probe_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time\n"
        "from ftune.machine import probe\n"
        "begin = time.perf_counter()\n"
        "found = probe()\n"
        "print(time.perf_counter() - begin)\n"
        "assert found.cpu_cores >= 1 and found.memory_bytes > 2**28 and found.platform\n"
        "assert not {'torch', 'numpy', 'importlib.metadata', 'pydantic'} & set(sys.modules)\n"
    )
    times: list[float] = []
    arguments: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    for _ in range(3):
        answer = subprocess.run([sys.executable, "-c", code], **arguments)
        assert answer.returncode == 0, answer.stderr
        times.append(float(answer.stdout))
    if not probe().gpus:
        assert min(times) < 0.05
