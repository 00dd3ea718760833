"""Sizes, counts and durations as people read them."""

from __future__ import annotations

import pytest

from ftune.units import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (2**50, "1024.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 k"),
        (999_999, "1.0 M"),
        (134_515_008, "135 M"),
        (7.6e9, "7.6 B"),
        (1e12, "1.0 T"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (187, "3:07"), (3729, "1:02:09")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
