"""The simulated allocator beside the real one: where each allocation was put, and what was asked of CUDA for it.

    python benchmarks/allocator_compare.py FILE...

A file is `allocator.json`, which `benchmarks/allocator.py` writes on a GPU, or a snapshot that
`torch.cuda.memory._dump_snapshot` wrote anywhere. A recording that began in the middle is followed from the state in
which it began, which its end and its events give away. Snapshots are pickles, and are read without running them.
"""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from ftune.memory.allocator import Block, CachingAllocator, OutOfMemory, link
from ftune.memory.allocator_settings import Settings

MIB = 1024 * 1024
NAMES = {"alloc": "a", "free_requested": "f", "segment_alloc": "S", "segment_free": "F"}
NAMES |= {"segment_map": "M", "segment_unmap": "U", "oom": "o"}


@dataclass
class Found:
    """What a comparison came to."""

    allocations: int = 0
    elsewhere: int = 0
    """Allocations that the simulation put at another address."""
    asked_otherwise: int = 0
    """Segments or pages that one side asked for, or gave back, and the other did not."""
    figures: int = 0
    differing: list[str] = field(default_factory=list)


class Followed(CachingAllocator):
    """The simulated allocator, given the addresses that CUDA gave; it notes what it asks for."""

    def __init__(self, settings: Settings, **limits: int) -> None:
        super().__init__(settings, **limits)
        self.coming: list[list[Any]] = []
        self.asked: list[list[Any]] = []
        self._starts: list[tuple[int, int]] = []

    def real(self, address: int) -> int:
        """Return where an address of an expandable segment really lies."""
        if not self._starts:
            return address
        ours, theirs = max(start for start in self._starts if start[0] <= address)
        return address - ours + theirs

    def _addresses(self, size: int) -> int:
        fitting = [entry for entry in self.coming if entry[0] == "S" and entry[2] == size]
        if self.settings.expandable_segments or not fitting:
            return super()._addresses(size)
        self.asked.append(fitting[0])
        self.coming.remove(fitting[0])
        return int(fitting[0][1])

    def _stretch(self, pool: Any, size: int) -> Block:
        before = self._next_address
        block = super()._stretch(pool, size)
        if self._next_address != before:
            mapped = [entry[1] for entry in self.coming if entry[0] == "M"]
            self._starts.append((block.address, mapped[0] if mapped else 0))
        return block

    def _map(self, pool: Any, block: Block, size: int) -> bool:
        address, before = self.real(block.address), self.reserved
        done = super()._map(pool, block, size)
        if done:
            self._note("M", address, self.reserved - before)
        return done

    def _unmap(self, pool: Any, block: Block) -> None:
        address, before = self.real(-(-block.address // pool.page) * pool.page), self.reserved
        super()._unmap(pool, block)
        if self.reserved != before:
            self._note("U", address, before - self.reserved)

    def _give_back(self, pool: Any, block: Block) -> None:
        super()._give_back(pool, block)
        self._note("F", block.address, block.size)

    def _note(self, what: str, address: int, size: int) -> None:
        entry = [what, address, size]
        self.asked.append(entry)
        if entry in self.coming:
            self.coming.remove(entry)


def follow(events: list[list[Any]], settings: Settings, segments: list[dict[str, Any]] | None = None) -> Found:
    """Do a recording's allocations; `segments` is what there was at its end."""
    allocator, found = Followed(settings), Found()
    live = beginning(allocator, events, segments or [])
    waiting: list[list[Any]] = []
    for what, address, size in events:
        if what in "SFMU":
            waiting.append([what, address, size])  # they stand before the allocation for which they were done
            continue
        if what == "f":
            allocator.free(live.pop(address))
            continue
        allocator.coming, allocator.asked = list(waiting), []
        allocator.capacity = _room(allocator.reserved, waiting, failed=what == "o")
        found.allocations += 1
        try:
            live[address] = block = allocator.allocate(size)
            found.elsewhere += what == "o" or allocator.real(block.address) != address
        except OutOfMemory:
            found.elsewhere += what == "a"
        found.asked_otherwise += allocator.asked != waiting
        waiting = []
    return found


def _room(reserved: int, waiting: list[list[Any]], failed: bool) -> int:
    """Return what the device had in all; only where memory was given back, or none was left, does that show."""
    grown = sum(size for what, _, size in waiting if what in "SM")
    shrunk = sum(size for what, _, size in waiting if what in "FU")
    return reserved + grown - shrunk if shrunk else reserved if failed else 1 << 62


def beginning(allocator: Followed, events: list[list[Any]], segments: list[dict[str, Any]]) -> dict[int, Block]:
    """Put the allocator into the state in which a recording began, by going back from its end."""
    sizes: dict[int, tuple[int, str]] = {}
    used: dict[int, int] = {}
    for segment in segments:
        sizes[segment["address"]] = (segment["total_size"], segment["segment_type"])
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                used[address] = block["size"]
            address += block["size"]
    for what, address, size in reversed(events) if segments else ():
        if what == "a":
            del used[address]
        elif what == "f":
            used[address] = allocator._rounded(size)
        elif what == "S":
            del sizes[address]
        elif what == "F":
            sizes[address] = (size, "large" if size > 2 * MIB else "small")
    if allocator.settings.expandable_segments:
        if used:
            raise ValueError("a recording with expandable segments is followed from an empty allocator only")
        return {}
    live: dict[int, Block] = {}
    for start, (total, kind) in sizes.items():
        inside = {at: used[at] for at in sorted(used) if start <= at < start + total}
        _lay_out(allocator, start, total, kind, inside, live)
    return live


def _lay_out(
    allocator: Followed, start: int, total: int, kind: str, used: dict[int, int], live: dict[int, Block]
) -> None:
    pool = allocator._small if kind == "small" else allocator._large
    spans: list[tuple[int, int, bool]] = []
    at = start
    for address, following in pairwise([*used, start + total]):
        if address > at:
            spans.append((at, address - at, False))
        size, rest = used[address], following - address - used[address]
        if kind == "large" and rest <= MIB:
            size += rest  # so little is not split off
        spans.append((address, size, True))
        at = address + size
    if at < start + total:
        spans.append((at, start + total - at, False))
    before = None
    for address, size, in_use in spans:
        block = Block(pool, address, size)
        link(block, before, None)
        before, block.in_use = block, in_use
        if in_use:
            live[address] = block
            allocator.allocated += size
        else:
            pool.insert(block)
    allocator.reserved += total
    allocator.peak_reserved = allocator.reserved


def figures(run: dict[str, Any], settings: Settings) -> Found:
    """Do a random sequence, and compare what was said after every event."""
    limits = {"allowed_bytes": run["limit_bytes"]} if run["limit_bytes"] else {}
    allocator, found = CachingAllocator(settings, **limits), Found()
    live: dict[int, Block] = {}
    full = set(run["full"])
    for position, (number, size) in enumerate(run["events"]):
        failed = False
        if size:
            try:
                live[number] = allocator.allocate(size)
            except OutOfMemory:
                failed = True
            found.allocations += 1
        elif number in live:
            allocator.free(live.pop(number))
        ours = (allocator.allocated, allocator.peak_allocated, allocator.reserved, allocator.peak_reserved, failed)
        names = ("allocated", "most_allocated", "reserved", "most_reserved")
        theirs = (*(run[name][position] for name in names), position in full)
        found.figures += len(ours)
        if ours != theirs:
            found.differing.append(f"event {position}: {ours} instead of {theirs}")
    if run["least_limit_bytes"]:
        found.figures += 1
        least = _least_limit(run["events"], settings, max(run["allocated"]) // MIB, max(run["reserved"]) // MIB)
        if least != run["least_limit_bytes"]:
            found.differing.append(f"least limit: {least} instead of {run['least_limit_bytes']}")
    return found


def _least_limit(events: list[list[int]], settings: Settings, low: int, high: int) -> int:
    """Return the least limit in which a sequence passes, found by the steps that the recording took."""
    while low < high:
        middle = (low + high) // 2
        allocator, live = CachingAllocator(settings, allowed_bytes=middle * MIB), dict[int, Block]()
        try:
            for number, size in events:
                if size:
                    live[number] = allocator.allocate(size)
                else:
                    allocator.free(live.pop(number))
            high = middle
        except OutOfMemory:
            low = middle + 1
    return high * MIB


class Plain(pickle.Unpickler):
    """Reads lists, dictionaries, numbers and texts; refuses everything that would be called."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a snapshot")


def comparisons(path: Path) -> list[tuple[str, Found]]:
    """Return every comparison that a file allows."""
    if path.suffix == ".json":
        found = []
        recorded = json.loads(path.read_text(encoding="utf-8"))
        for name, part in {**recorded.get("sequences", {}), **recorded.get("training", {})}.items():
            settings = Settings.parse(part.get("setting", ""))
            found += [(f"{name}, seed {run['seed']}", figures(run, settings)) for run in part.get("runs", ())]
            if "marks" in part:
                found.append((name, follow(part["events"], settings)))
        return found
    with path.open("rb") as file:
        snapshot = Plain(file).load()
    settings = Settings.parse((snapshot.get("allocator_settings") or {}).get("PYTORCH_CUDA_ALLOC_CONF", ""))
    found = []
    for device, trace in enumerate(snapshot["device_traces"]):
        events = [[NAMES[one["action"]], one.get("addr", 0), one["size"]] for one in trace if one["action"] in NAMES]
        segments = [segment for segment in snapshot["segments"] if segment["device"] == device]
        if events:
            found.append((f"{path.name}, device {device}", follow(events, settings, segments)))
    return found


def main() -> int:
    total = Found()
    for path in map(Path, sys.argv[1:]):
        for name, found in comparisons(path):
            print(
                f"{name}: {found.allocations} allocations, {found.elsewhere} elsewhere, "
                f"{found.asked_otherwise} asked otherwise, {len(found.differing)} of {found.figures} figures differ"
            )
            for line in found.differing[:3]:
                print("   ", line)
            total.allocations += found.allocations
            total.elsewhere += found.elsewhere + found.asked_otherwise + len(found.differing)
    print(f"{total.allocations} allocations, {total.elsewhere} differences")
    return 1 if total.elsewhere else 0


if __name__ == "__main__":
    sys.exit(main())
