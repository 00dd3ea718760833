"""What this machine has: GPUs, processor, memory and packages, found without importing any of them.

Asked once and handed on as a frozen value, so that a test can pretend to be another machine.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

_MIB = 1024 * 1024
_QUERY = "index,uuid,name,memory.total,compute_cap"
_TIMEOUT_SECONDS = 10
"""A driver that has to wake up can take several seconds to answer the first time."""

_NO_DEVICES = ("NoDevFiles", "none", "void")
"""What containers write into CUDA_VISIBLE_DEVICES to hide every GPU."""

_IMPORT_NAMES = {"pyyaml": "yaml", "flash_attn_3": "flash_attn_interface"}
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
    unknown_device: str = ""
    """The first entry of CUDA_VISIBLE_DEVICES that names no GPU; CUDA reads no further."""

    def has(self, package: str) -> bool:
        """Return whether a package of this import name is installed."""
        return self.version_of(package) is not None

    def version_of(self, package: str) -> str | None:
        """Return the installed version of a package, by its import name or that of its distribution."""
        return self.packages.get(_import_name(package.partition(".")[0]))

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        """Where a run computes: `cuda` where there is a GPU, else `cpu`."""
        return "cuda" if self.gpus else "cpu"

    @property
    def lacks_cuda(self) -> bool:
        """Whether there is a GPU that the installed PyTorch cannot use."""
        return bool(self.gpus) and "+cpu" in self.packages.get("torch", "")

    @property
    def torch_install(self) -> str:
        """The command that installs the same PyTorch with CUDA."""
        return f"pip install --force-reinstall torch=={self.packages.get('torch', '').partition('+')[0]}"

    def computes_bfloat16(self) -> bool:
        """Return whether bfloat16 products are done in hardware."""
        if self.gpus:
            return all(gpu.capability >= (8, 0) for gpu in self.gpus)
        return bool(self.cpu_flags & {"avx512_bf16", "amx_bf16", "bf16"})


def probe() -> Machine:
    """Look at this machine; costs milliseconds without a GPU, about 0.1 s with one."""
    gpus, unknown_device = _gpus()
    return Machine(
        gpus=gpus,
        cpu_flags=_cpu_flags(Path("/proc/cpuinfo")),
        cpu_cores=_cpu_cores(),
        memory_bytes=memory_bytes(),
        packages=installed(sys.path),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        unknown_device=unknown_device,
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


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return (), ""
    table = _nvidia_smi(f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    if table is None:
        return (), ""
    listing = _nvidia_smi("-L") if "MIG-" in (visible or "") else None
    return parse_gpus(table, visible, listing or "")


def _nvidia_smi(*arguments: str) -> str | None:
    """Return what NVIDIA's own program answers; None where it is not there, or has nothing to say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def parse_gpus(table: str, visible: str | None, listing: str = "") -> tuple[tuple[Gpu, ...], str]:
    """Read nvidia-smi's table (and its listing of MIG devices, the parts that a GPU can be split into).

    Returns what CUDA_VISIBLE_DEVICES names, in its order, up to its first unknown entry; and that entry.
    """
    by_index: dict[str, Gpu] = {}
    by_uuid: dict[str, Gpu] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 5:
            continue
        gpu = Gpu(cells[2], _memory_of(cells[3]), _capability(cells[4]))
        by_index[cells[0]] = by_uuid[cells[1]] = gpu
    if visible is None:
        return tuple(by_index.values()), ""
    parts = _mig_devices(listing, by_uuid)
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        part = _named(entry, "MIG-", parts)
        if part is not None and not chosen:
            # A process sees one MIG device, and no other device beside it.
            return (part,), ""
        found = by_index.get(entry) or _named(entry, "GPU-", by_uuid)
        if found is None:
            return tuple(chosen), "" if entry.startswith("-") or entry in _NO_DEVICES else entry
        chosen.append(found)
    return tuple(chosen), ""


def _named(entry: str, kind: str, by_uuid: Mapping[str, Gpu]) -> Gpu | None:
    """Return the device of a name, which may be cut short where only one begins so."""
    matches = [gpu for uuid, gpu in by_uuid.items() if entry.startswith(kind) and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _mig_devices(listing: str, by_uuid: Mapping[str, Gpu]) -> dict[str, Gpu]:
    found: dict[str, Gpu] = {}
    whole: Gpu | None = None
    for line in listing.splitlines():
        uuid = line.rpartition("UUID:")[2].strip(" )")
        profile = re.search(r"MIG (\S*?([0-9]+)gb\S*)", line)
        if uuid in by_uuid:
            whole = by_uuid[uuid]
        elif whole is not None and profile is not None and uuid.startswith("MIG-"):
            memory = int(profile.group(2)) * 1024 * _MIB
            found[uuid] = Gpu(f"{whole.name} MIG {profile.group(1)}", memory, whole.capability)
    return found


def _memory_of(mebibytes: str) -> int:
    """Boards that share the processor's memory answer `[N/A]`: then it is the machine's."""
    return int(float(mebibytes) * _MIB) if mebibytes.replace(".", "", 1).isdigit() else memory_bytes()


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


def free_bytes() -> int:
    """Return the memory that is free now, at most what a container may use."""
    import psutil

    return min(int(psutil.virtual_memory().available), memory_bytes())


def memory_bytes() -> int:
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
