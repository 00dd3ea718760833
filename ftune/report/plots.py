"""The curves of a run as inline SVG; the colours are the page's variables, so that they follow light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ftune.units import format_bytes

_VARIABLES = {
    "#010101": "var(--text)",
    "#020202": "var(--line)",
    "#030303": "var(--first)",
    "#040404": "var(--second)",
    **{f"#0505{number:02d}": f"var(--area-{number})" for number in range(1, 9)},
}
"""Colours that matplotlib draws in, and what stands for them in the page."""
_TEXT, _LINE, _FIRST, _SECOND, *_AREAS = _VARIABLES

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
    "svg.hashsalt": "ftune",  # without it every drawing has other ids
    "font.size": 11,
    "axes.unicode_minus": False,
    "axes.formatter.useoffset": False,  # ticks say their whole value
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "text.color": _TEXT,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "axes.labelcolor": _TEXT,
}

_MANY = 4000
"""From this many points on matplotlib leaves out those that would not be seen."""
_FEW = 40
"""Up to this many points each is marked, and up to ten times as many a line is broad."""


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    key: str
    label: str
    said: Callable[[float], str]
    steps: tuple[float, ...]
    values: tuple[float, ...]

    def caption(self) -> str:
        """Return the line in words: for those who cannot see it, and for exact values."""
        seen = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        (first, begin), (last, end) = seen[0], seen[-1]
        if len(seen) == 1:
            return f"{self.label}{self.said(begin)} at step {_count(first)}"
        low, high = (pick(value for _, value in seen) for pick in (min, max))
        return (
            f"{self.label}{self.said(begin)} at step {_count(first)}, {self.said(end)} at step {_count(last)}, "
            f"between {self.said(low)} and {self.said(high)}"
        )


@dataclass(frozen=True)
class Plot:
    """A drawn plot."""

    name: str
    title: str
    caption: str
    svg: str


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


_PLOTS: tuple[tuple[str, str, tuple[tuple[str, str, Callable[[float], str]], ...]], ...] = (
    ("loss", "Loss", (("loss", "training ", _loss), ("eval_loss", "evaluation ", _loss))),
    ("learning-rate", "Learning rate", (("learning_rate", "", _short),)),
    ("gradient-norm", "Gradient norm", (("grad_norm", "", _short),)),
    ("speed", "Tokens per second", (("tokens_per_second", "", _count),)),
    ("memory", "Peak memory", (("peak_memory_bytes", "", format_bytes),)),
)


def draw(metrics: Sequence[dict[str, Any]]) -> list[Plot]:
    """Return the plots for which the metrics have any points."""
    drawn = []
    for name, title, lines in _PLOTS:
        found = [_series(metrics, key, label, said) for key, label, said in lines]
        series = [one for one in found if any(math.isfinite(value) for value in one.values)]
        if series:
            caption = "; ".join(one.caption() for one in series)
            drawn.append(Plot(name, title, caption[:1].upper() + caption[1:] + ".", _svg(name, series)))
    return drawn


def _series(metrics: Sequence[dict[str, Any]], key: str, label: str, said: Callable[[float], str]) -> Series:
    points = [(_number(line.get("step")), _number(line[key])) for line in metrics if key in line]
    known = [(step, value) for step, value in points if math.isfinite(step)]
    return Series(key, label, said, tuple(step for step, _ in known), tuple(value for _, value in known))


def _number(value: Any) -> float:
    """Return a number; what is none, or infinite, becomes a gap in the line."""
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def histogram(name: str, title: str, edges: Sequence[int], counts: Sequence[int]) -> Plot:
    """Return how many things are how large, as bars."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(7.0, 2.2), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.stairs(counts, edges, fill=True, color=_FIRST)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
        svg = _for_page(name, _drawn(figure))
    caption = f"{sum(counts):,} rows of {edges[0]:,} to {edges[-1] - 1:,} tokens; the highest bar has {max(counts):,}."
    return Plot(name, title, caption, svg)


@dataclass(frozen=True)
class Area:
    """One of several amounts that lie on each other."""

    key: str
    label: str
    values: tuple[int, ...]
    """Bytes, column by column."""


def areas(
    name: str,
    title: str,
    caption: str,
    drawn: Sequence[Area],
    *,
    parts: Sequence[tuple[str, int, int]],
    line: tuple[str, int],
) -> Plot:
    """Return amounts of bytes on each other, with the names of stretches of columns above, and a line at an amount."""
    said, most = line
    highest = max(most, *(sum(column) for column in zip(*(one.values for one in drawn), strict=True)))
    size, unit = (2**30, "GiB") if highest >= 2**30 else (2**20, "MiB")
    columns = len(drawn[0].values)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(10.0, 4.2), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        edges, base = list(range(columns + 1)), [0.0] * columns
        for one, colour in zip(drawn, _AREAS, strict=False):
            top = [below + value / size for below, value in zip(base, one.values, strict=True)]
            axes.stairs(top, edges, baseline=base, fill=True, color=colour, label=one.label, gid=f"area-{one.key}")
            base = top
        axes.axhline(most / size, color=_TEXT, linewidth=0.8, linestyle="--")
        axes.annotate(said, (columns, most / size), xytext=(0, 3), textcoords="offset points", ha="right", va="bottom")
        for phase, first, last in parts:
            if first:
                axes.axvline(first, color=_TEXT, linewidth=0.6, linestyle=":")
            if last - first > columns / 12:
                axes.annotate(
                    phase,
                    ((first + last) / 2, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, 4),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                )
        axes.set_xlim(0, columns)
        axes.set_ylim(0, 1.08 * highest / size)
        axes.set_ylabel(unit)
        axes.set_xlabel("storages made and freed, in order")
        axes.set_xticks([])
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        svg = _for_page(name, _drawn(figure))
    return Plot(name, title, caption, svg)


def colours(count: int) -> list[str]:
    """Return the page's names of the colours in which `areas` draws so many of them, the lowest first."""
    return [_VARIABLES[colour] for colour in _AREAS[:count]]


def _drawn(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return out.getvalue()


def _svg(name: str, series: Sequence[Series]) -> str:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["path.simplify"] = max(len(one.steps) for one in series) > _MANY
        figure = Figure(figsize=(5.0, 2.5), layout="constrained", facecolor="none")
        _lines(figure.add_subplot(facecolor="none"), series)
        return _for_page(name, _drawn(figure))


def _lines(axes: Axes, series: Sequence[Series]) -> None:
    size, unit = _unit(series[0])
    for one in series:
        colour, dash = (_SECOND, "--") if one.key == "eval_loss" else (_FIRST, "-")
        width = 1.6 if len(one.values) <= 10 * _FEW else 1.0
        values = [value / size for value in one.values]
        marks: dict[str, Any] = {"marker": "o", "markersize": 4.0} if len(values) <= _FEW else {}
        axes.plot(one.steps, values, dash, color=colour, linewidth=width, label=one.label.strip(), gid=one.key, **marks)
    axes.grid(axis="y", linewidth=0.6)
    axes.tick_params(length=3)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_ylabel(unit)
    if series[0].said is _count:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    elif series[0].said is _short:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    if series[0].said in (_count, format_bytes):
        axes.set_ylim(0, 1.1 * axes.dataLim.y1 or 1)  # amounts: half as high is half as much
    if series[0].label:
        axes.legend(frameon=False)


def _unit(one: Series) -> tuple[int, str]:
    """Return what an axis is divided by, and the name of that."""
    if one.said is not format_bytes:
        return 1, ""
    most = max(value for value in one.values if math.isfinite(value))
    return (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")


def _for_page(name: str, svg: str) -> str:
    """Return a drawing as part of a page: without a prologue of its own, its ids apart from the other plots'."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.strip()
