"""The whole story of a run, top to bottom."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed

from ftune.data.prepare import Prepared
from ftune.models.load import load_tokenizer
from ftune.models.quiet import quiet
from ftune.quantized.model import codes_of
from ftune.resolve import Decision, RunSpec, check_later
from ftune.training import checkpoint as checkpoints
from ftune.training import directory, failure, progress
from ftune.training.callbacks import MetricsLog, SaveAfterEvaluation, StopOnRequest
from ftune.training.fit import check_lengths, check_packing, check_room, check_vocabulary, unfinished_sweep
from ftune.training.foretold import ChooseRows, Forecast, Foresee, check_alone, foretold, settle_rows
from ftune.training.loading import collator_of, load_base, load_rows, prompts_of, ready, shared_out, tell
from ftune.training.passes import Passes, passes_of
from ftune.training.result import RunResult, finish
from ftune.training.samples import Samples
from ftune.training.settings import settings_of
from ftune.training.trainer import FtuneTrainer, Parts


def train(
    spec: RunSpec,
    *,
    plain: bool = False,
    checkpoint: Path | None = None,
    foresee: Foresee | None = None,
    choose_rows: ChooseRows | None = None,
    force: bool = False,
    launched: bool = False,
) -> RunResult:
    """Run a spec from its start or from a checkpoint; raises FtuneError, and leaves `result.json` in every case.

    `choose_rows` settles a `per_device_train_batch_size` that is still `auto`. Where `foresee` is given, the run's plan
    is asked for before its weights are loaded. One that cannot fit stops the run, unless that is forced.
    `launched` says that a launcher passes on what the user asks for.
    """
    main = os.environ.get("RANK", "0") == "0"
    shown = progress.choose(plain=plain, main=main)
    home = Path(spec.recipe.training.output_dir)
    stop = StopOnRequest(launched=launched)
    held = directory.held(home) if main else contextlib.nullcontext()
    with held, failure.written_down(spec, main=main) as course, stop.listening():
        try:
            foretells = functools.partial(foretold, foresee, force=force) if foresee is not None and main else None
            return _run(spec, checkpoint, shown, stop, course, foretells, choose_rows)
        finally:
            shown.close()


def _run(
    spec: RunSpec,
    checkpoint: Path | None,
    shown: progress.Progress,
    stop: StopOnRequest,
    course: failure.Course,
    foretells: Callable[[RunSpec, Prepared, progress.Progress], Forecast | None] | None,
    choose_rows: ChooseRows | None,
) -> RunResult:
    started, recipe = time.perf_counter(), spec.recipe
    check_alone(spec, plans=choose_rows is not None)
    home, main = Path(recipe.training.output_dir), os.environ.get("RANK", "0") == "0"
    if main:
        checkpoints.remove_partial(home)
    # Before any process group: ranks wait on files for the one that tokenises, whom no watchdog then ends.
    tokenizer = load_tokenizer(recipe.model, shown.say)
    data = load_rows(spec, tokenizer)
    spec = _settled(spec, data, choose_rows, shown)
    if foretells is not None:
        course.forecast = foretells(spec, data, shown)
    spec, model = load_base(spec, shown)
    recipe = spec.recipe
    evaluates = recipe.training.eval_strategy != "no" or recipe.data.eval is not None
    arguments = settings_of(spec, eval_on_start=checkpoint is None and evaluates)  # a resumed run has had it before
    tell(data, recipe, shown)
    check_lengths(recipe, data, model)
    check_vocabulary(tokenizer, model, data)
    check_packing(recipe, model)
    collator = collator_of(recipe, tokenizer, model, data)
    set_seed(recipe.training.seed)
    model = shared_out(spec, ready(spec, model, data, collator, shown), arguments, shown)

    metrics, samples = MetricsLog(home, shown), Samples(prompts_of(spec, data), shown)
    parts = Parts(recipe, model, tokenizer, data.train, data.eval, collator, arguments, data.names)
    trainer = _trainer(spec, parts, [SaveAfterEvaluation(), stop, metrics, samples], shown)
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
    samples.trainer = trainer
    trainer.stop, course.trainer = stop, trainer
    if checkpoint is not None:
        trainer.load_counts(checkpoint)
    if trainer.is_world_process_zero():
        metrics.forget_after(step, evaluated=trainer.evaluated_at(step))
        samples.forget_after(step)
    if checkpoint is None:
        samples.before = samples.ask("before")
    with quiet():
        if checkpoint is not None and trainer.has_ended(checkpoint):
            trainer.load_end(checkpoint)
        else:
            with stop.between_steps():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return finish(
        trainer,
        samples,
        stopped=stop.stopped,
        wall_seconds=time.perf_counter() - started,
        predicted_peak_bytes=course.forecast.allocated_bytes if course.forecast is not None else None,
        shown=shown,
    )


def _settled(spec: RunSpec, data: Prepared, choose_rows: ChooseRows | None, shown: progress.Progress) -> RunSpec:
    """Return the spec with what only the rows could tell."""
    if spec.recipe.data.format == "auto":
        check_later(spec, "data.format", data.format, shown.say)
        spec = directory.settle(spec, Decision("data.format", data.format, "the first row has its keys"))
    if spec.recipe.training.per_device_train_batch_size == "auto":
        assert choose_rows is not None, "who leaves rows open says who chooses them"
        spec = settle_rows(choose_rows, spec, data, shown)
    return spec


def _trainer(spec: RunSpec, parts: Parts, callbacks: list[TrainerCallback], shown: progress.Progress) -> FtuneTrainer:
    """Return what trains, having said what is odd about what it will do; raises MachineError without room for it."""
    training = spec.recipe.training
    if training.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(training.early_stopping_patience, training.early_stopping_threshold))
    with quiet():
        trainer = FtuneTrainer(parts, callbacks)
    trainer.remove_callback(PrinterCallback)
    if training.on_out_of_memory == "shrink" or passes_of(spec):
        trainer.passes = Passes(spec, shown)
    check_room(trainer)
    if (unfinished := unfinished_sweep(trainer)) is not None:
        shown.say(f"warning: {unfinished}")
    check_later(spec, "training.max_steps", trainer.planned_steps(), shown.say)
    _say_what_moves(trainer, shown)
    return trainer


def _say_what_moves(trainer: FtuneTrainer, shown: progress.Progress) -> None:
    from ftune.adapters.bits import count
    from ftune.units import format_count

    weights = list(trainer.model.parameters())
    trained = sum(count(weight) for weight in weights if weight.requires_grad)
    coded = sum(codes.out_features * codes.in_features for codes in codes_of(trainer.model).values())
    every = coded + sum(map(count, weights))
    shown.say(f"training {format_count(trained)} of {format_count(every)} weights")
