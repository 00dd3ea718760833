"""GPUs by name: how much memory they have, and how fast they are at best (`gpus.json`, each with its source).

`torch_gib` is what torch.cuda reports as total, rounded down from what drivers of 2023 to 2026 were seen to leave; it
varies with the driver by about 0.2 GiB, and is null where no report was found.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

from ftune.errors import Problem, RecipeError
from ftune.machine import Gpu

_GIB = 1024**3
_UNITS = {"gib": _GIB, "gb": 10**9, "g": _GIB, "mib": 1024**2, "mb": 10**6, "tib": 1024**4, "tb": 10**12}
_MAKERS = ("nvidia", "geforce", "tesla", "amd", "instinct", "radeon", "quadro", "gpu")

_SEEN_BY_TORCH = 0.965
"""Part of the memory on the label taken where no report was found: what the RTX 40 and 50 of the table report."""
_DRIVER_KEEPS = 0.985
"""Part of what nvidia-smi calls total that torch sees, on GPUs that are not in the table."""


@dataclass(frozen=True)
class GpuFacts:
    """A GPU as the planner sees it. Rates are the datasheet's, without sparsity."""

    name: str
    memory_bytes: int
    """What torch.cuda reports as the device's total, of which the context takes its part."""
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability; (0, 0) where only a size of memory was given."""
    memory_bytes_per_second: float = 0.0
    flops_per_second: Mapping[str, float] | None = field(default=None, hash=False)
    """By dtype (`float32`, `tf32`, `float16`, `bfloat16`, `float8`), sums in float32; None where unknown."""
    nvlink_bytes_per_second: float = 0.0
    """To the other GPUs, both directions together; 0 without NVLink."""
    pcie_bytes_per_second: float = 0.0
    """To the host, one direction."""
    source: str = ""
    assumed: str = ""
    """What a name that fits several GPUs was taken for."""

    @property
    def has_speed(self) -> bool:
        """Return whether a time can be told, and not only whether it fits."""
        return self.flops_per_second is not None

    def peak_flops(self, dtype: str) -> float:
        """Return the multiplications and additions per second in a dtype; of float32 where the GPU lacks it."""
        rates = self.flops_per_second or {}
        return rates.get(dtype) or rates.get("float32", 0.0)


@cache
def known_gpus() -> tuple[GpuFacts, ...]:
    """Return every GPU of the table."""
    return tuple(_facts(row) for row in _rows())


@cache
def _rows() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(resources.files("ftune.memory").joinpath("gpus.json").read_text(encoding="utf-8")))


def _facts(row: Mapping[str, Any]) -> GpuFacts:
    reported = row["torch_gib"] or row["memory_gib"] * _SEEN_BY_TORCH
    return GpuFacts(
        name=row["name"],
        memory_bytes=int(reported * _GIB),
        capability=(row["capability"][0], row["capability"][1]),
        memory_bytes_per_second=row["memory_gb_per_second"] * 1e9,
        flops_per_second={dtype: rate * 1e12 for dtype, rate in row["tflops"].items()},
        nvlink_bytes_per_second=row["nvlink_gb_per_second"] * 1e9,
        pcie_bytes_per_second=row["pcie_gb_per_second"] * 1e9,
        source=row["source"],
    )


def find_gpu(text: str) -> GpuFacts:
    """Return the GPU of a name (`a100`, `A100-80GB`, `rtx4090`, `4090`) or of a size (`24GiB`, `80GB`: memory alone).

    Raises RecipeError for an unknown name, and for one that fits GPUs with different memory.
    """
    size = _size(text)
    if size is not None:
        return GpuFacts(f"a GPU with {text.strip()}", size)
    wanted = _plain(text)
    exact = _named().get(wanted)
    if exact is not None:
        others = [gpu.name for gpu in _beginning(wanted, r"\d+gb|sxm|pcie|nvl") if _apart(gpu, exact)]
        if others:
            names = ", ".join(others)
            return replace(exact, assumed=f"{text} is taken as {exact.name}; there is also {names}")
        return exact
    matching = _beginning(wanted) if wanted else []
    if matching and not any(_apart(gpu, matching[0]) for gpu in matching):
        assumed = f"{text} is taken as {matching[0].name}" if len(matching) > 1 else ""
        return replace(matching[0], assumed=assumed)
    if matching:
        raise _unclear(f"{text} is the name of GPUs with different memory", [gpu.name for gpu in matching])
    raise _unclear(f"no GPU of the name {text!r} is known", _near(wanted))


def of_this_machine(gpu: Gpu) -> GpuFacts:
    """Return what is known of a GPU that was found here: its memory from the driver, its speed from the table."""
    known = _named().get(_plain(gpu.name))
    if known is None:
        return GpuFacts(gpu.name, int(gpu.memory_bytes * _DRIVER_KEEPS), gpu.capability)
    # The driver counts what it keeps for itself; torch does not see that.
    return replace(known, memory_bytes=min(known.memory_bytes, gpu.memory_bytes))


def _size(text: str) -> int | None:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match.group(2) not in _UNITS:
        return None
    return int(float(match.group(1)) * _UNITS[match.group(2)]) or None


def _plain(name: str) -> str:
    """Return a name without maker, case, spaces and dashes: `NVIDIA GeForce RTX 4090` is `rtx4090`."""
    words = re.split(r"[^a-z0-9]+", name.lower().replace("gib", "gb"))
    return "".join(word for word in words if word not in _MAKERS)


@cache
def _named() -> dict[str, GpuFacts]:
    found: dict[str, GpuFacts] = {}
    for row, gpu in zip(_rows(), known_gpus(), strict=True):
        for name in (row["name"], *row["aliases"]):
            plain = _plain(name)
            for spelling in (plain, plain.removeprefix("rtx")):
                found.setdefault(spelling, gpu)
    return found


def _beginning(wanted: str, rest: str = "") -> list[GpuFacts]:
    """Return GPUs of which a name begins so, a number being whole: `4070` is no `407`."""
    found = []
    for plain, gpu in _named().items():
        after = plain[len(wanted) :]
        cut = wanted[-1].isdigit() and after[:1].isdigit() and not re.match(r"[1-9]\d*gb", after)
        if plain.startswith(wanted) and not cut and re.match(rest, after):
            found.append(gpu)
    return list(dict.fromkeys(found))


def _apart(one: GpuFacts, other: GpuFacts) -> bool:
    return abs(one.memory_bytes - other.memory_bytes) > _GIB


def _near(wanted: str) -> list[str]:
    near = difflib.get_close_matches(wanted, list(_named()), n=6, cutoff=0.5)
    return list(dict.fromkeys(_named()[plain].name for plain in near))[:3]


def _unclear(what: str, names: list[str]) -> RecipeError:
    shown = ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
    fix = f"say which: {shown}; " if names else ""
    return RecipeError(Problem("gpu-name", what, fix=f"{fix}a size such as --gpu 24GiB always works"))
