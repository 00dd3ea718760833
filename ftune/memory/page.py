"""A plan as one HTML page that loads nothing: what is held, when, and of which kind."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from ftune import rundir
from ftune.errors import Problem, RunError
from ftune.memory.ask import Planned
from ftune.memory.live import Live, live
from ftune.memory.micro_batches import followed
from ftune.memory.plan import PARTS
from ftune.memory.shown import SAID, heading, lines_of, verdict
from ftune.report import plots
from ftune.units import format_bytes


def write(path: Path, found: Planned) -> Path:
    """Write the page of a plan with its trace; raises RunError where there is no room."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_text(path, render(found))
    except OSError as error:
        fix = "name a file in a directory that can be written to"
        raise RunError(Problem("plan-write", f"cannot write {path}", why=str(error), fix=fix)) from None
    return path


def render(found: Planned) -> str:
    """Return the text of the page."""
    assert found.trace is not None, "a page shows the whole step"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    plan = found.plan
    step = live(found.trace)
    drawn = _areas(step)
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).render(
        name=found.spec.recipe.model.model_name_or_path,
        heading=heading(found.spec, plan),
        verdict=verdict(plan),
        status="failed" if plan.fits is False else "tight" if plan.is_tight else "fits" if plan.fits else "",
        lines=lines_of(plan),
        parts=[(SAID.get(part, part), size, format_bytes(size)) for part, size in plan.parts.items() if size],
        needed=(plan.peak_bytes, format_bytes(plan.peak_bytes)),
        phases=[(phase, size, format_bytes(size)) for phase, size in plan.phases.items()],
        plot=_plot(found, step, drawn),
        legend=list(zip([one.label for one in drawn], plots.colours(len(drawn)), strict=True))[::-1],
        decisions=found.decisions,
        svg=Markup,  # what matplotlib drew: numbers and words of ours, no text of the recipe's
    )


def _areas(found: Live) -> list[plots.Area]:
    """Return what owners hold, what stays longest at the bottom."""
    named = ((owner, PARTS[owner]) for owner in PARTS)
    every = [plots.Area(part, SAID.get(part, part), found.by_owner[owner]) for owner, part in named]
    return [one for one in every if any(one.values)]


def _plot(planned: Planned, step: Live, drawn: list[plots.Area]) -> plots.Plot:
    plan, passes = planned.plan, planned.spec.recipe.training.gradient_accumulation_steps
    highest = step.totals.index(max(step.totals))
    held = [(one.label, one.values[highest]) for one in drawn if one.values[highest]]
    caption = f"At the peak, in {plan.peak_at}, {format_bytes(plan.live_bytes)} are alive: "
    caption += ", ".join(f"{label} {format_bytes(size)}" for label, size in held)
    caption += ". Each column is the fullest instant of its stretch of the step."
    if (shown := followed(planned.spec)) < passes:
        caption += f" Of {passes} micro-batches {shown} are drawn; the others do what the last of them does."
    stretches = [(one.phase, one.first, one.last) for one in step.stretches]
    line = f"{format_bytes(plan.live_bytes)} at the peak", plan.live_bytes
    return plots.areas("live", "Bytes alive over a step", caption, drawn, parts=stretches, line=line)
