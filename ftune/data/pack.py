"""Which rows share a sequence: best-fit decreasing, whole rows only."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return groups of row numbers whose lengths sum to at most `capacity`; every row is in exactly one.

    The longest row goes first, each into the fullest sequence that still has room (at most 11/9 of the best possible
    number of sequences, plus a constant; Johnson 1973). Sequences are bucketed by the room left in them, of which there
    are at most `capacity` values, so that a million rows take seconds. Groups keep the order of the file.
    """
    groups: list[list[int]] = []
    buckets: dict[int, list[int]] = {}
    rooms: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[row]
        if length > capacity:
            raise ValueError(f"row {row} has {length} tokens, a sequence holds {capacity}")
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            group, room = len(groups), capacity
            groups.append([])
        else:
            room = rooms[at]
            group = buckets[room].pop()
            if not buckets[room]:
                del buckets[room], rooms[at]
        groups[group].append(row)
        left = room - length
        if left not in buckets:
            buckets[left] = []
            bisect.insort(rooms, left)
        buckets[left].append(group)
    return sorted(sorted(group) for group in groups)
