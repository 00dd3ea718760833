"""What ftune refuses, warns about, or notes: every row, in one table.

Rows quantify over facts that plugins declare, not over names, so a new method needs no new row.
"""

from __future__ import annotations

from ftune.rules import adapters, course, device, gradients, mixing, precision, rows, sharding
from ftune.rules.rule import Rule

RULES: tuple[Rule, ...] = (
    *(*precision.RULES, *rows.RULES, *mixing.RULES, *course.RULES),
    *(*gradients.RULES, *adapters.RULES, *sharding.RULES, *device.RULES),
)
