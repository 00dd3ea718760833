"""The page: what a run directory holds, in the words and units of a reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ftune import rundir
from ftune.errors import Problem, RunError
from ftune.report import plots
from ftune.report.read import Run, read
from ftune.units import format_bytes, format_duration

_ENDINGS = {
    "finished": "finished",
    "interrupted": "interrupted",
    "failed": "failed",
    "": "no result yet: it is running, or was killed",
}


@dataclass(frozen=True)
class Figure:
    """A row of the first table; `exact` is the value as `result.json` has it."""

    key: str
    label: str
    shown: str
    exact: str


@dataclass(frozen=True)
class Answer:
    """What the model answered at one moment."""

    when: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers; where there are many, only some are shown at once."""

    prompt: tuple[tuple[str, str], ...]
    """Role and text of each message; the role is empty for a prompt that is plain text."""
    shown: tuple[Answer, ...]
    more: tuple[Answer, ...]


def write(directory: Path) -> Path:
    """Write the report of a run into its directory; raises RunError where there is no run, or no room."""
    path = directory / rundir.REPORT
    # A model may answer half a surrogate pair, which no UTF-8 file can hold.
    text = render(read(directory)).encode("utf-8", "replace").decode("utf-8")
    try:
        rundir.write_text(path, text)
    except OSError as error:
        fix = "make the directory writable, or make room on its disk"
        raise RunError(Problem("report-write", f"cannot write {path}", why=str(error), fix=fix)) from None
    return path


def render(run: Run) -> str:
    """Return the text of the page; the same run gives the same text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    status = str(run.result.get("status") or "")
    return template.render(
        run=run,
        name=_name(run),
        status=status or "unknown",
        ending=_ENDINGS.get(status, status),
        facts=_facts(run),
        figures=_figures(run.result, on_processor=run.spec.get("device_type") == "cpu"),
        plots=plots.draw(run.metrics),
        samples=_samples(run),
        decisions=_decisions(run),
        fingerprints=_pairs(run.spec.get("data_fingerprint")),
        versions=_versions(run),
        svg=Markup,  # what matplotlib drew: numbers and ids of ours, no text of the run's
    )


def _name(run: Run) -> str:
    training = run.section("training")
    return str(training.get("run_name") or Path(str(training.get("output_dir") or "")).name or "a run")


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return what the run is about, for the lines under the title."""
    model = run.section("model")
    names = [model.get("model_name_or_path"), model.get("gguf_file")]
    methods = [("tuning", run.section("tuning").get("method")), ("objective", run.section("objective").get("method"))]
    facts = [("model", " / ".join(str(name) for name in names if name)), *methods, ("seed", run.spec.get("seed"))]
    return [(label, str(value)) for label, value in facts if value not in (None, "")]


_FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "steps": ("optimizer steps", "{:,}".format),
    "train_loss": ("training loss, mean of all steps", "{:.4f}".format),
    "eval_loss": ("evaluation loss, last", "{:.4f}".format),
    "tokens": ("tokens seen", "{:,}".format),
    "supervised_tokens": ("tokens learned", "{:,}".format),
    "tokens_per_second": ("tokens per second", "{:,.1f}".format),
    "wall_seconds": ("time", format_duration),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "predicted_peak_bytes": ("peak memory, predicted", format_bytes),
    "best_checkpoint": ("best checkpoint", str),
    "error": ("error", str),
    "message": ("message", str),
}


_ON_PROCESSOR = {
    "peak_memory_bytes": "peak memory, of the process",
    "predicted_peak_bytes": "peak memory, predicted of tensors alone",
}
"""What is measured and what is predicted are the same on a GPU only."""


def _figures(result: dict[str, Any], *, on_processor: bool = False) -> list[Figure]:
    """Return the rows of `result.json`: what we know in its unit, what is new as it is."""
    rows = []
    for key in [*(key for key in _FIGURES if key in result), *(key for key in result if key not in _FIGURES)]:
        value = result[key]
        if value is None or key == "status":
            continue
        label, said = _FIGURES.get(key, (key, _value))
        if on_processor and result.get("predicted_peak_bytes") is not None:
            label = _ON_PROCESSOR.get(key, label)
        try:
            shown = said(value)
        except (TypeError, ValueError, OverflowError):  # not the kind of value it should be
            shown = _value(value)
        rows.append(Figure(key, label, shown, _value(value)))
    return rows


def _samples(run: Run) -> list[Sample]:
    """Return the prompts in the order in which they were asked."""
    answers: dict[str, list[Answer]] = {}
    prompts: dict[str, Any] = {}
    for row in run.samples:
        key = json.dumps(row.get("prompt"))
        prompts[key] = row.get("prompt")
        when, step = str(row.get("when")), row.get("step")
        answers.setdefault(key, []).append(Answer(f"{when}, step {step}", str(row.get("answer"))))
    return [_sample(prompts[key], said) for key, said in answers.items()]


def _sample(prompt: Any, said: list[Answer]) -> Sample:
    """Show a handful side by side: the first, the middle and the last of many."""
    last = len(said) - 1
    shown = range(len(said)) if last < 4 else (0, len(said) // 2, last)
    more = (answer for at, answer in enumerate(said) if at not in shown)
    return Sample(_messages(prompt), tuple(said[at] for at in shown), tuple(more))


def _messages(prompt: Any) -> tuple[tuple[str, str], ...]:
    turns = prompt if isinstance(prompt, list) else [prompt]
    return tuple(
        (str(turn.get("role") or ""), _value(turn.get("content"))) if isinstance(turn, dict) else ("", _value(turn))
        for turn in turns
    )


def _decisions(run: Run) -> list[tuple[str, str, str, str]]:
    found = run.spec.get("decisions")
    known = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return [(str(one.get("key")), _value(one.get("value")), str(one.get("why")), str(one.get("by"))) for one in known]


def _versions(run: Run) -> list[tuple[str, str]]:
    ours = [("ftune", run.spec.get("ftune_version")), ("device", run.spec.get("device_type"))]
    return [(name, str(value)) for name, value in ours if value] + _pairs(run.spec.get("versions"))


def _pairs(values: Any) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in values.items()] if isinstance(values, dict) else []


def _value(value: Any) -> str:
    """Return a value as a recipe writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
