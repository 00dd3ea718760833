"""Scalars take what a person means, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from ftune import options


class Everything(options.Options):
    number: options.Number = 0.0
    integer: options.Integer = 0
    flag: options.Flag = False
    text: options.Text = "x"
    number_or_auto: options.NumberOrAuto = "auto"
    flag_or_auto: options.FlagOrAuto = "auto"
    fraction: options.Fraction = 0.0
    positive: options.Positive = 1


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("number", "1e-3", 1e-3),
        ("number", 3, 3.0),
        ("integer", 3.0, 3),
        ("integer", "3", 3),
        ("integer", "-9007199254740993", -9007199254740993),
        ("integer", 2**63 - 1, 2**63 - 1),
        ("number_or_auto", "auto", "auto"),
        ("number_or_auto", "0.5", 0.5),
        ("flag_or_auto", "auto", "auto"),
        ("flag_or_auto", False, False),
        ("fraction", 0, 0.0),
    ],
)
def test_accepted(key: str, value: Any, read: Any) -> None:
    got = getattr(Everything(**{key: value}), key)
    assert got == read
    assert type(got) is type(read)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("number", [True, "x", "", "1,5", "nan", math.inf, math.nan, 10**400, None, [], {}, "1e999"]),
        ("integer", [True, 1.5, "1.5", "x", math.inf, math.nan, 2**63, -(2**64), 10**400, "9" * 30, None]),
        ("flag", [1, 0, "true", "no", None]),
        ("text", [1, "", " ", "a\nb", "a\0", "\ud800", None, ["a"]]),
        ("number_or_auto", [True, "Auto", "automatic", -1, None]),
        ("flag_or_auto", [1, "yes", "true", None]),
        ("fraction", [1, 1.0, -0.1, True]),
        ("positive", [0, -1]),
    ],
)
def test_refused(key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValidationError):
            Everything(**{key: value})


def test_defaults_have_the_declared_type() -> None:
    assert isinstance(Everything().positive, float)


def test_unknown_keys_and_changes_are_refused() -> None:
    with pytest.raises(ValidationError):
        Everything(other=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Everything().number = 3
