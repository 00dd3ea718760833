"""One self-contained HTML file about a run: how it went, what it said, what was chosen and why."""

from ftune.report.page import write

__all__ = ["write"]
