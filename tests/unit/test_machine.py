from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftune import machine
from ftune.machine import Gpu, Machine, installed, parse_gpus, probe

TABLE = """\
0, GPU-aaaa, NVIDIA A100-SXM4-80GB, 81920, 8.0
1, GPU-bbbb, NVIDIA GeForce GTX 1080, 8192, 6.1
"""
A100 = Gpu("NVIDIA A100-SXM4-80GB", 80 * 1024**3, (8, 0))
GTX = Gpu("NVIDIA GeForce GTX 1080", 8 * 1024**3, (6, 1))


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, (A100, GTX)),
        ("0,1", (A100, GTX)),
        ("1,0", (GTX, A100)),
        (" 1 ", (GTX,)),
        ("GPU-bb", (GTX,)),
        ("0,7,1", (A100,)),
        ("-1", ()),
        ("NoDevFiles", ()),
    ],
)
def test_visible_devices_choose_as_cuda_does(visible: str | None, gpus: tuple[Gpu, ...]) -> None:
    assert parse_gpus(TABLE, visible) == gpus


def test_shared_memory_and_nonsense_lines() -> None:
    found = parse_gpus("warning: x\n0, GPU-1, NVIDIA GB10, [N/A], 12.1\n", None)
    assert found == (Gpu("NVIDIA GB10", machine._memory_bytes(), (12, 1)),)


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


def test_a_hanging_driver_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_TIMEOUT_SECONDS", 0.2)
    fake_smi(tmp_path, "exec sleep 30")
    begin = time.perf_counter()
    assert probe().gpus == ()
    assert time.perf_counter() - begin < 10


def test_packages_are_found_by_import_name(tmp_path: Path) -> None:
    for name in ("flash_attn-2.8.1.dist-info", "PyYAML-6.0.dist-info", "Old.Thing-1.0-py3.11.egg-info", "README"):
        (tmp_path / name).mkdir()
    found = installed([str(tmp_path), str(tmp_path / "missing")])
    assert found == {"flash_attn": "2.8.1", "yaml": "6.0", "old_thing": "1.0"}
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
