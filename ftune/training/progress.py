"""Showing a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from ftune.units import format_bytes, format_duration


class Progress(Protocol):
    """Where a run is shown."""

    def say(self, text: str) -> None: ...

    def start(self, step: int, steps: int) -> None: ...

    def advance(self, step: int) -> None: ...

    def show(self, line: dict[str, Any], steps: int, seconds_left: float | None) -> None: ...

    def close(self) -> None: ...


def choose(*, plain: bool, main: bool) -> Progress:
    """Return a bar on a terminal of the first rank, plain lines elsewhere, nothing on the other ranks."""
    if not main:
        return Silent()
    return PlainLines() if plain or not sys.stdout.isatty() else Bar()


class Silent:
    """The other ranks say nothing."""

    def say(self, text: str) -> None:
        pass

    def start(self, step: int, steps: int) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def show(self, line: dict[str, Any], steps: int, seconds_left: float | None) -> None:
        pass

    def close(self) -> None:
        pass


class PlainLines:
    """A line per logged step, greppable."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def start(self, step: int, steps: int) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def show(self, line: dict[str, Any], steps: int, seconds_left: float | None) -> None:
        end = f"  {format_duration(seconds_left)} left" if seconds_left is not None else ""
        self.say(f"step {line['step']}/{steps}  {in_words(line)}{end}")

    def close(self) -> None:
        pass


class Bar:
    """rich's progress bar, with the last metrics beside it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.console = Console(highlight=False)
        self.bar = RichProgress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
        )
        self.task: Any = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def start(self, step: int, steps: int) -> None:
        if self.task is None:
            self.bar.start()
            self.task = self.bar.add_task("train", total=steps, completed=step, metrics="")

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def show(self, line: dict[str, Any], steps: int, seconds_left: float | None) -> None:
        if "eval_loss" in line or self.task is None:
            self.say(f"step {line['step']}  {in_words(line)}")
        else:
            self.bar.update(self.task, metrics=in_words(line))

    def close(self) -> None:
        self.bar.stop()


def in_words(line: dict[str, Any]) -> str:
    """Return a line of metrics as a person reads it."""
    if "eval_loss" in line:
        return f"eval_loss {line['eval_loss']:.4f}"
    parts = [f"loss {line['loss']:.4f}"]
    if "learning_rate" in line:
        parts.append(f"lr {line['learning_rate']:.2e}")
    if line.get("grad_norm") is not None:
        parts.append(f"grad {line['grad_norm']:.2f}")
    parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    parts.append(format_bytes(line["peak_memory_bytes"]))
    return "  ".join(parts)
