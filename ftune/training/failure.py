"""How a run fails: what can be explained is, and `result.json` says so in every case."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftune import plugin, rundir
from ftune.errors import FtuneError, Interrupted, Problem, RunError
from ftune.resolve import RunSpec
from ftune.training import checkpoint
from ftune.training.foretold import Forecast, spoken
from ftune.training.passes import lengths_of, ran_out_of_memory
from ftune.training.shrinking import EVALUATING, MOVING, PASSES, Doing, ShrinkingTrainer


@dataclass
class Course:
    """How far a run has come: what there is to tell if it fails."""

    forecast: Forecast | None = None
    trainer: ShrinkingTrainer | None = None


@contextlib.contextmanager
def written_down(spec: RunSpec, *, main: bool) -> Iterator[Course]:
    """Turn what can be explained into an FtuneError, and leave a result either way."""
    course = Course()
    try:
        yield course
    except BaseException as error:
        explained = _explain(error, spec, course)
        if main:
            _write(Path(spec.recipe.training.output_dir), explained)
        if explained is error:
            raise
        raise explained from error


def _explain(error: BaseException, spec: RunSpec, course: Course) -> BaseException:
    if isinstance(error, FtuneError):
        return error
    home = Path(spec.recipe.training.output_dir)
    kept = rundir.checkpoints(home)
    resume = f"go on with: ftune resume {home}" if kept else "nothing was saved yet"
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(Problem("interrupted", "stopped at once, without saving", fix=resume))
    if ran_out_of_memory(error):
        return RunError(out_of_memory(error, spec, course))
    if checkpoint.out_of_room(error):
        return RunError(Problem("disk-full", "the disk is full", why=str(error)[:200], fix=f"free it, then {resume}"))
    return error


def out_of_memory(error: BaseException, spec: RunSpec, course: Course) -> Problem:
    """Return what is said of a run without memory: doing what, for which rows, beside what, and what to change."""
    doing = course.trainer.doing if course.trainer is not None else Doing()
    device = "the GPU" if spec.device_type == "cuda" else "this machine"
    when = f", {doing.what} at step {doing.step}" if doing.what else "" if course.trainer else ", before the first step"
    why = []
    if doing.batch is not None:
        lengths = lengths_of(doing.batch)
        rows = f"rows of {', '.join(map(str, lengths))} tokens" if len(lengths) > 1 else f"a row of {lengths[0]} tokens"
        why.append(rows + (f", in {doing.passes} passes" if doing.passes > 1 else ""))
    if course.forecast is not None:
        why.append(f"the plan has at the peak {spoken(course.forecast.parts)}")
    why.append((str(error).strip().splitlines() or [type(error).__name__])[0][:200])
    fix = "; or ".join(_ways(spec, doing)) or "a smaller model, or a device with more memory"
    return Problem("out-of-memory", f"{device} has no memory left{when}", why="; ".join(why), fix=fix)


def _ways(spec: RunSpec, doing: Doing) -> Iterator[str]:
    """Yield what would need less, that which changes least what is learned first."""
    training, tuning = spec.recipe.training, plugin.tuning(spec.recipe.tuning.method)
    home, method = Path(training.output_dir), plugin.optimizer(spec.recipe.optimizer.method)
    if doing.what == EVALUATING:
        rows = max(1, training.per_device_eval_batch_size // 2)
        go_on = f"ftune resume {home} --set" if rundir.checkpoints(home) else "set"
        yield f"{go_on} training.per_device_eval_batch_size={rows}"
        return
    if doing.what == PASSES and doing.batch is not None and len(doing.batch["input_ids"]) > doing.passes:
        if method.gradients is plugin.Gradients.KEPT and rundir.checkpoints(home):
            yield f"ftune resume {home} --set training.on_out_of_memory=shrink, which halves what is computed at once"
        yield from _smaller_batch(spec, doing)
    if doing.what != MOVING and not training.gradient_checkpointing:
        yield "set gradient_checkpointing: true"
    if not tuning.frozen_base:
        yield "set tuning: {method: lora}"
    if doing.what == PASSES:
        yield f"set a lower data.max_length than {spec.recipe.data.max_length}"


def _smaller_batch(spec: RunSpec, doing: Doing) -> Iterator[str]:
    training, method = spec.recipe.training, plugin.optimizer(spec.recipe.optimizer.method)
    if training.max_tokens_per_batch is not None:
        tokens = training.max_tokens_per_batch // (2 * doing.passes)
        key, half = "max_tokens_per_batch", tokens
    elif training.rows_at_once > doing.passes:
        key, half = "per_device_train_batch_size", training.rows_at_once // (2 * doing.passes)
    else:
        return
    times = training.gradient_accumulation_steps * 2 * doing.passes
    same = f" with gradient_accumulation_steps: {times}" if method.accumulates(spec.recipe.optimizer.options) else ""
    yield f"set {key}: {max(1, half)}{same}"


def _write(home: Path, error: BaseException) -> None:
    if isinstance(error, Interrupted) and rundir.status(home) == "interrupted":
        return  # written with the run's figures when it was saved
    status = "interrupted" if isinstance(error, Interrupted) else "failed"
    values = {"status": status, "error": type(error).__name__, "message": str(error)}
    with contextlib.suppress(OSError):  # a full disk must not hide why the run failed
        rundir.write_text(home / rundir.RESULT, json.dumps(values, indent=2) + "\n")
    _draw_again(home)


def _draw_again(home: Path) -> None:
    """Bring the report of an earlier end up to date; where it cannot be, none is better than a wrong one."""
    path = home / rundir.REPORT
    if not path.exists():
        return
    try:
        from ftune import report

        report.write(home)
    except Exception:
        with contextlib.suppress(OSError):
            path.unlink()
