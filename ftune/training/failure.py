"""How a run fails: what can be explained is, and `result.json` says so in every case."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from ftune import plugin, rundir
from ftune.errors import FtuneError, Interrupted, Problem, RunError
from ftune.resolve import RunSpec
from ftune.training import checkpoint


@contextlib.contextmanager
def written_down(spec: RunSpec, *, main: bool) -> Iterator[None]:
    """Turn what can be explained into an FtuneError, and leave a result either way."""
    try:
        yield
    except BaseException as error:
        explained = _explain(error, spec)
        if main:
            _write(Path(spec.recipe.training.output_dir), explained)
        if explained is error:
            raise
        raise explained from error


def _explain(error: BaseException, spec: RunSpec) -> BaseException:
    if isinstance(error, FtuneError):
        return error
    home = Path(spec.recipe.training.output_dir)
    kept = rundir.checkpoints(home)
    resume = f"go on with: ftune resume {home}" if kept else "nothing was saved yet"
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(Problem("interrupted", "stopped at once, without saving", fix=resume))
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(_out_of_memory(error, spec))
    if checkpoint.out_of_room(error):
        return RunError(Problem("disk-full", "the disk is full", why=str(error)[:200], fix=f"free it, then {resume}"))
    return error


def _out_of_memory(error: BaseException, spec: RunSpec) -> Problem:
    training = spec.recipe.training
    batch = training.per_device_train_batch_size
    ways = []
    if batch > 1:
        accumulation = training.gradient_accumulation_steps * 2
        ways.append(
            f"per_device_train_batch_size: {max(1, batch // 2)} with gradient_accumulation_steps: {accumulation}"
        )
    if not training.gradient_checkpointing:
        ways.append("gradient_checkpointing: true")
    if not plugin.tuning(spec.recipe.tuning.method).frozen_base:
        ways.append("tuning: {method: lora}")
    why = str(error).split("\n", maxsplit=1)[0][:200]
    fix = "; or ".join(ways) or f"a lower data.max_length than {spec.recipe.data.max_length}"
    return Problem("out-of-memory", "the GPU has no memory left", why=why, fix=fix)


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
