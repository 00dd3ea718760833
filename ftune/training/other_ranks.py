"""Going on with another number of ranks: the rows of a step stay those that they would have been."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ftune import plugin
from ftune.errors import Problem, RunError
from ftune.resolve import Decision, RunSpec, with_training
from ftune.training import checkpoint


def for_ranks(spec: RunSpec, found: Path, now: int) -> tuple[RunSpec, list[str]]:
    """Return the run as `now` ranks go on with it from a checkpoint, and what is to be said of that.

    Each step takes as many rows as before, in the same order; raises RunError where that cannot be.
    """
    state = json.loads((found / checkpoint.STATE).read_text(encoding="utf-8"))
    before, training = int(state["ranks"]), spec.recipe.training
    if training.group_by_length or training.max_tokens_per_batch is not None or spec.recipe.data.streaming:
        if before != now:
            raise RunError(_refused(found, before, now, "rows were shared out by length, or streamed, for that many"))
        return spec, []
    each = training.per_device_train_batch_size * training.gradient_accumulation_steps
    rows = int(state.get("rows_per_step", each * before))
    if each * now == rows:
        return spec, [] if before == now else [_told(before, now)]
    if rows % now:
        why = f"a step takes {rows} rows, which {now} ranks cannot share equally"
        raise RunError(_refused(found, before, now, why))
    own = rows // now
    size = max(count for count in range(1, training.per_device_train_batch_size + 1) if own % count == 0)
    optimizer = plugin.optimizer(spec.recipe.optimizer.method)
    if own > size and not optimizer.accumulates(spec.recipe.optimizer.options):
        why = f"a rank would add up {own // size} micro-batches, which {optimizer.name} does not do"
        raise RunError(_refused(found, before, now, why))
    changed = with_training(spec, per_device_train_batch_size=size, gradient_accumulation_steps=own // size)
    why = f"{now} rank{'s take' if now > 1 else ' takes'} the {rows} rows of a step that {before} took"
    decisions = [
        Decision("training.per_device_train_batch_size", size, why),
        Decision("training.gradient_accumulation_steps", own // size, why),
    ]
    kept = [made for made in spec.decisions if made.key not in {decision.key for decision in decisions}]
    said = [f"{decision.key} = {decision.value}: {decision.why}" for decision in decisions]
    return replace(changed, decisions=(*kept, *decisions)), [*said, *([_told(before, now)] if before != now else [])]


def _told(before: int, now: int) -> str:
    return (
        f"{now} rank{'s go' if now > 1 else ' goes'} on with what {before} began: sums are taken in another order, and "
        "random numbers (dropout) are drawn anew"
    )


def _refused(found: Path, before: int, now: int, why: str) -> Problem:
    fix = f"start it as before: ftune resume RUN_DIR --gpus {before} (or as many over several --nodes)"
    fix = fix if before > 1 else "start it in one process: ftune resume RUN_DIR"
    what = f"{found.name} was saved by {before} rank{'s' if before > 1 else ''}, and cannot go on with {now}"
    return Problem("resume-ranks", what, why=why, fix=fix)
