"""What a search for a fit found, on a terminal."""

from __future__ import annotations

from collections import Counter
from typing import Any, TextIO

from ftune.memory.changes import Option
from ftune.memory.fit import Change, Fit
from ftune.memory.search import Tried
from ftune.recipe.edits import flow
from ftune.units import format_bytes

_WIDTH = 110
"""Columns where there is no terminal to ask."""
_MOST_ROWS = 12
"""Candidates that are shown; all are in the search."""


def show_fit(found: Fit, stream: TextIO) -> None:
    """Print what was tried, what is to be changed, and what that costs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False, soft_wrap=True, width=None if stream.isatty() else _WIDTH)
    plan = found.after.plan
    has = f"; {plan.device} has {format_bytes(plan.capacity_bytes)}" if plan.capacity_bytes else ""
    console.print(f"recipes with the same batch of {_batch(found)} rows a step{has}")
    if plan.assumed:
        console.print(plan.assumed)
    table = Table(box=box.ASCII2 if not console.is_terminal else box.SIMPLE_HEAD)
    sides = {
        "changes": "left",
        "rows x passes": "right",
        "needs": "right",
        "at most": "right",
        "s a step": "right",
        "": "left",
    }
    for name, side in sides.items():
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    for tried in _shown(found):
        table.add_row(*_row(tried, found))
    console.print(table)
    for line in (*_left(found), *_verdict(found)):
        console.print(line)


def _batch(found: Fit) -> int:
    training = found.before.candidate.spec.recipe.training
    return int(training.rows_at_once * training.gradient_accumulation_steps)


def _shown(found: Fit) -> list[Tried]:
    order = sorted(found.tried, key=lambda tried: (not tried.plan.fits, tried.cost, tried.plan.peak_bytes))
    first = [found.before] + ([found.after] if found.after is not found.before else [])
    rest = [tried for tried in order if tried not in first]
    return (first + rest)[:_MOST_ROWS]


def _row(tried: Tried, found: Fit) -> tuple[str, ...]:
    seconds = tried.plan.seconds_per_step
    verdict = "fits" if tried.fits(comfortable=True) else "tight" if tried.plan.fits else "too large"
    if tried is found.after:
        verdict += ", taken" if found.fits else ", nearest"
    return (
        "\n".join(_said(option) for option in tried.options) or "none",
        f"{tried.rows} x {_batch(found) // tried.rows}",
        format_bytes(tried.plan.peak_bytes),
        format_bytes(tried.plan.need.high_bytes),
        f"{seconds:.2g}" if seconds is not None else "",
        verdict,
    )


def _said(option: Option) -> str:
    """Return the first of the keys that an option sets, which the others follow."""
    key, value = next(iter((option.settings or option.with_several_passes).items()))
    value = value["method"] if isinstance(value, dict) else value
    return f"{key.removeprefix('training.')}: {_value(value)}"


def _value(value: Any) -> str:
    return (
        flow(value) if isinstance(value, (str, int, float, bool, dict, list)) else "-" if value is None else "removed"
    )


def _left(found: Fit) -> list[str]:
    reasons = Counter(left.reason for left in found.left)
    if not reasons:
        return []
    lines = [f"{sum(reasons.values())} others were left out:"]
    lines += [f"  {count} x {reason}" for reason, count in reasons.most_common(6)]
    return lines


def _verdict(found: Fit) -> list[str]:
    plan = found.after.plan
    if not found.fits:
        return _nothing(found)
    if not found.changes:
        return [
            "it fits as it is, tightly" if plan.is_tight else "it fits as it is: nothing is faster without more memory"
        ]
    lines = ["it fits, tightly, with" if plan.is_tight else "it fits with"]
    lines += [_change(change) for change in found.changes]
    return lines


def _change(change: Change) -> str:
    saves = ""
    if change.saves_bytes:
        saved = format_bytes(abs(change.saves_bytes))
        saves = f", saves {saved}" if change.saves_bytes > 0 else f", takes {saved} more"
    return f"  {change.key}: {_value(change.before)} -> {_value(change.after)}{saves}\n    costs {change.costs}"


def _nothing(found: Fit) -> list[str]:
    plan = found.after.plan
    missing = format_bytes(plan.peak_bytes - (plan.capacity_bytes or 0))
    lines = [f"nothing fits; the nearest needs {format_bytes(plan.peak_bytes)}, {missing} more than there is"]
    lines += [_change(change) for change in found.changes]
    if found.buys:
        lines.append("what might fit if you allow it, by its weights, gradients and optimizer state alone:")
        lines += [f"  --allow {name}: {format_bytes(size)} and more" for name, size in found.buys[:6]]
    return lines
