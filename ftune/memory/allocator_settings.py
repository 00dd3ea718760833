"""The settings of PyTorch's CUDA allocator: what the environment says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_MIB = 1024 * 1024
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Settings:
    """What PYTORCH_ALLOC_CONF can say of it, or PYTORCH_CUDA_ALLOC_CONF, its older name."""

    expandable_segments: bool = False
    """One segment per pool, which grows by pages, in place of many."""
    max_split_bytes: int = UNLIMITED
    """Blocks of this size and more are not split."""
    max_rounding_bytes: int = 20 * _MIB
    """How much larger than the request such a block may be."""
    power2_divisions: tuple[int, ...] = (0,) * 16
    """In how many sizes each doubling is divided, from 1 MiB to 64 GiB; 0 and 1: rounding to 512 B alone."""
    large_segment_bytes: int = 20 * _MIB
    """Segment for requests of less than 10 MiB, and page of the large pool's expandable segment."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """Return those of a process with this environment."""
        return cls.parse(environment.get("PYTORCH_ALLOC_CONF") or environment.get("PYTORCH_CUDA_ALLOC_CONF", ""))

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Read the variable's text; what does not change the bytes is passed over."""
        found: dict[str, str] = dict(re.findall(r"(\w+)\s*:\s*(\[[^\]]*\]|[^,\[\]]+)", text))
        given: dict[str, object] = {}
        if "expandable_segments" in found:
            given["expandable_segments"] = found["expandable_segments"].strip() == "True"
        for key, name in (
            ("max_split_size_mb", "max_split_bytes"),
            ("max_non_split_rounding_mb", "max_rounding_bytes"),
            ("large_segment_size_mb", "large_segment_bytes"),
        ):
            if key in found:
                given[name] = int(found[key]) * _MIB
        if "roundup_power2_divisions" in found:
            given["power2_divisions"] = _divisions(found["roundup_power2_divisions"])
        return cls(**given)  # type: ignore[arg-type]


def _divisions(text: str) -> tuple[int, ...]:
    """Read `4`, or `[256:1,512:2,>:4]`: divisions from each size in MiB on (parseRoundUpPower2Divisions)."""
    if not text.startswith("["):
        return (int(text),) * 16
    divisions = [0] * 16
    last = None
    for limit, count in re.findall(r"(>|\d+)\s*:\s*(\d+)", text):
        if limit == ">":
            first = 0 if last is None else last + 1
            divisions[first:] = [int(count)] * (16 - first)
        else:
            place = min(int(limit).bit_length() - 1, 15)
            first = 0 if last is None else place
            divisions[first : place + 1] = [int(count)] * (place + 1 - first)
            last = place
    return tuple(divisions)
