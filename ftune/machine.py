"""What this machine has: GPUs, processor, memory and packages, found without importing any of them.

Asked once and handed on as a frozen value, so that a test (or `ftune plan --gpu`) can pretend to be another machine.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_MIB = 1024 * 1024
_QUERY = "index,uuid,name,memory.total,compute_cap"
_TIMEOUT_SECONDS = 10
"""A driver that has to wake up can take several seconds to answer the first time."""

_IMPORT_NAMES = {"pyyaml": "yaml", "torch_optimi": "optimi"}
"""Distribution to import name, where the two differ by more than dashes."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """CUDA compute capability: (8, 0) is Ampere."""


@dataclass(frozen=True)
class Machine:
    """What there is to compute with."""

    gpus: tuple[Gpu, ...] = ()
    cpu_flags: frozenset[str] = frozenset()
    """Instruction sets by their Linux names; empty where the system does not list them."""
    cpu_cores: int = 1
    memory_bytes: int = 0
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of every installed package, by import name."""
    platform: str = ""

    def has(self, package: str) -> bool:
        """Return whether a package of this import name is installed."""
        return _import_name(package.partition(".")[0]) in self.packages

    @property
    def device_type(self) -> str:
        """Where a run computes: `cuda` where there is a GPU, else `cpu`."""
        return "cuda" if self.gpus else "cpu"

    def computes_bfloat16(self) -> bool:
        """Return whether bfloat16 products are done in hardware."""
        if self.gpus:
            return all(gpu.capability >= (8, 0) for gpu in self.gpus)
        return bool(self.cpu_flags & {"avx512_bf16", "amx_bf16", "bf16"})


def probe() -> Machine:
    """Look at this machine; costs milliseconds without a GPU, about 0.1 s with one."""
    return Machine(
        gpus=_gpus(),
        cpu_flags=_cpu_flags(Path("/proc/cpuinfo")),
        cpu_cores=_cpu_cores(),
        memory_bytes=_memory_bytes(),
        packages=installed(sys.path),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def installed(folders: Iterable[str]) -> dict[str, str]:
    """Return version by import name, from the names of the metadata folders alone (reading each would cost 50 ms)."""
    found: dict[str, str] = {}
    for folder in folders:
        try:
            entries = os.listdir(folder or ".")
        except OSError:
            continue
        for entry in entries:
            stem, dot, suffix = entry.rpartition(".")
            if dot and suffix in ("dist-info", "egg-info"):
                name, _, version = stem.partition("-")
                found.setdefault(_import_name(name), version.partition("-py")[0])
    return found


def _import_name(distribution: str) -> str:
    name = distribution.lower().replace("-", "_").replace(".", "_")
    return _IMPORT_NAMES.get(name, name)


def _gpus() -> tuple[Gpu, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return ()
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(answer.stdout, visible) if answer.returncode == 0 else ()


def parse_gpus(text: str, visible: str | None) -> tuple[Gpu, ...]:
    """Read nvidia-smi's table; keep what CUDA_VISIBLE_DEVICES names, in its order, up to its first unknown entry."""
    by_index: dict[str, Gpu] = {}
    by_uuid: dict[str, Gpu] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 5:
            continue
        gpu = Gpu(cells[2], _memory_of(cells[3]), _capability(cells[4]))
        by_index[cells[0]] = by_uuid[cells[1]] = gpu
    if visible is None:
        return tuple(by_index.values())
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        matches = [gpu for uuid, gpu in by_uuid.items() if entry.startswith("GPU-") and uuid.startswith(entry)]
        found = by_index.get(entry) or (matches[0] if len(matches) == 1 else None)
        if found is None:
            break
        chosen.append(found)
    return tuple(chosen)


def _memory_of(mebibytes: str) -> int:
    """Boards that share the processor's memory answer `[N/A]`: then it is the machine's."""
    return int(float(mebibytes) * _MIB) if mebibytes.replace(".", "", 1).isdigit() else _memory_bytes()


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() and (minor or "0").isdigit() else (0, 0)


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def _cpu_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    """Return the memory this process may use: the machine's, or less where a container is held to less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and 0 < int(text) < total:
            total = int(text)
    return total
