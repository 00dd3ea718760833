"""The trained model again from what a run began with and its log of 12 bytes a step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ftune import export, plugin, rundir
from ftune.data.template import use_template_file
from ftune.errors import MachineError, Problem, RunError
from ftune.models.finished import spec_of, write_finished
from ftune.models.load import load_model, load_tokenizer
from ftune.models.quiet import quiet
from ftune.models.source import Say, silent
from ftune.places import expanded
from ftune.resolve import RunSpec
from ftune.zeroth import log
from ftune.zeroth.replay import replay


@dataclass(frozen=True)
class Rebuilt:
    """A model that was rebuilt."""

    directory: Path
    steps: int


def rebuild(run_directory: Path, output: Path, *, steps: int | None = None, say: Say = silent) -> Rebuilt:
    """Write to `output` the model that a run of a zeroth-order optimizer ended with, or had after some steps.

    It needs the run's `run.json` and log, and the initial model as it was. On any failure nothing is left in `output`.
    """
    spec = spec_of(run_directory)
    log.read(run_directory)  # refuses before minutes are spent on loading
    output = expanded(output)
    export.refuse_existing(output)
    if spec.device_type == "cuda" and not torch.cuda.is_available():
        why = "the run drew its directions on a GPU, and a CPU draws others from the same seeds"
        fix = "rebuild it on a machine with a GPU"
        raise MachineError(Problem("rebuild-device", "this run cannot be rebuilt on a CPU", why=why, fix=fix))
    recipe = spec.recipe
    tokenizer = load_tokenizer(recipe.model, say)
    if recipe.data.chat_template:
        use_template_file(tokenizer, recipe.data.chat_template)
    say("loading the initial model")
    tuning, options = plugin.tuning(recipe.tuning.method), recipe.tuning.options
    held = tuning.quantization(options)
    model = load_model(recipe.model, device_type=spec.device_type, say=say, quantization=held)
    set_seed(recipe.training.seed)  # an adapter begins with what the run's seed drew
    model = tuning.prepare(model, options, directory=run_directory, batches=_no_rows, say=say)
    with quiet():
        model = tuning.apply(model, options, batches=_no_rows)
    model.to(next(model.parameters()).device)
    wanted = steps if steps is not None else _last(run_directory, spec)
    say("replaying the log")
    taken = replay(model, run_directory, wanted)
    output.resolve().parent.mkdir(parents=True, exist_ok=True)
    try:
        with quiet(), rundir.new_directory(output.resolve()) as folder:
            write_finished(tuning.finished(model), tokenizer, recipe, folder, directory=run_directory)
    except OSError as error:
        fix = "make room, or name another --output, and rebuild again"
        problem = Problem("output-unwritable", f"could not write `{output}`; nothing was left", why=str(error), fix=fix)
        raise RunError(problem) from None
    return Rebuilt(output, taken)


def _last(run_directory: Path, spec: RunSpec) -> int | None:
    """Return the step whose weights the run ended with, where that is not the last one."""
    if not spec.recipe.training.load_best_model_at_end:
        return None
    try:
        result = json.loads((run_directory / rundir.RESULT).read_text(encoding="utf-8"))
        best = result["best_checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(best.rpartition("-")[2]) if best else None


def _no_rows(count: int, *, rows: int | None = None) -> Iterable[dict[str, Any]]:
    what = "the run began with something made of its training rows, which its log does not hold"
    fix = f"restore {rundir.CODES} in the run directory, if it had one; else use the run's model or a checkpoint"
    raise RunError(Problem("zeroth-order-log", what, why="its rows are not at hand", fix=fix))
