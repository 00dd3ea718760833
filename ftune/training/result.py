"""How a run ends: the last evaluation, the saved model, the answers of after, `result.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ftune import plugin, rundir
from ftune.errors import Interrupted, Problem
from ftune.models.finished import write_finished
from ftune.models.quiet import quiet
from ftune.training import checkpoint
from ftune.training.meter import peak_memory_bytes
from ftune.training.progress import Progress
from ftune.training.samples import Samples
from ftune.training.trainer import FtuneTrainer
from ftune.units import format_bytes, format_duration


@dataclass(frozen=True)
class RunResult:
    """How a run ended; the content of `result.json`, and where it lies."""

    directory: str
    status: str
    steps: int
    train_loss: float | None
    eval_loss: float | None
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    wall_seconds: float
    peak_memory_bytes: int
    predicted_peak_bytes: int | None
    best_checkpoint: str | None


def finish(
    trainer: FtuneTrainer,
    samples: Samples,
    *,
    stopped: bool,
    wall_seconds: float,
    predicted_peak_bytes: int | None,
    shown: Progress,
) -> RunResult:
    """Save what there is to save and write the result; raises Interrupted where the user stopped the run."""
    if stopped:
        result = _result(trainer, "interrupted", wall_seconds, predicted_peak_bytes)
        _write(trainer, result, shown)
        shown.close()
        saved = rundir.checkpoint_name(trainer.state.global_step)
        fix = f"go on with: ftune resume {trainer.directory}"
        raise Interrupted(
            Problem("interrupted", f"stopped at step {trainer.state.global_step}; saved {saved}", fix=fix)
        )
    trainer.show_average()
    best = trainer.best_checkpoint()
    if trainer.recipe.training.load_best_model_at_end and best is not None:
        trainer.load_best(best)
    trainer.stop_if_weights_not_finite()
    if trainer.eval_dataset is not None and not trainer.evaluated_at(trainer.state.global_step):
        trainer._determine_best_metric(trainer.evaluate(), None)
    trainer.model = plugin.tuning(trainer.recipe.tuning.method).finished(trainer.model)
    _save_model(trainer)
    answers = samples.ask("after")
    shown.close()
    samples.show(answers)
    result = _result(trainer, "finished", wall_seconds, predicted_peak_bytes)
    _write(trainer, result, shown)
    shown.say(_summary(result, comparable=trainer.args.device.type == "cuda"))
    return result


def _save_model(trainer: FtuneTrainer) -> None:
    """Write `model/`: it loads with plain transformers (or peft), tokenizer and template included."""
    trainer.accelerator.wait_for_everyone()
    with trainer.with_whole_weights():
        if trainer.is_world_process_zero():
            _write_model(trainer)
    trainer.accelerator.wait_for_everyone()


def _write_model(trainer: FtuneTrainer) -> None:
    final = trainer.directory / rundir.MODEL
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model.config.use_cache = True  # the Trainer turns it off, and generating without it is slow
    try:
        with quiet(), rundir.whole_directory(final) as folder:
            write_finished(model, trainer.processing_class, trainer.recipe, folder, directory=trainer.directory)
    except Exception as error:
        if checkpoint.out_of_room(error):
            raise checkpoint.saving_failed(final, error) from None
        raise


def _result(trainer: FtuneTrainer, status: str, wall_seconds: float, predicted_peak_bytes: int | None) -> RunResult:
    meter = trainer.meter
    trainer.close_meter()
    best = trainer.best_checkpoint()
    return RunResult(
        directory=str(trainer.directory),
        status=status,
        steps=trainer.state.global_step,
        train_loss=meter.total_loss / meter.total_steps if meter.total_steps else None,
        eval_loss=trainer.last_evaluation[1] if trainer.last_evaluation else None,
        tokens=meter.tokens,
        supervised_tokens=meter.supervised_tokens,
        tokens_per_second=round(meter.tokens / meter.seconds, 1) if meter.seconds > 0 else 0.0,
        wall_seconds=round(wall_seconds, 3),
        peak_memory_bytes=peak_memory_bytes(trainer.args.device),
        predicted_peak_bytes=predicted_peak_bytes,
        best_checkpoint=str(best.relative_to(trainer.directory)) if best else None,
    )


def _write(trainer: FtuneTrainer, result: RunResult, shown: Progress) -> None:
    if trainer.is_world_process_zero():
        values = {name: value for name, value in asdict(result).items() if name != "directory"}
        rundir.write_text(trainer.directory / rundir.RESULT, json.dumps(values, indent=2) + "\n")
        _draw(trainer.directory, shown)


def _draw(directory: Path, shown: Progress) -> None:
    """Write `report.html`; whatever goes wrong there, the run itself is done and saved."""
    try:
        from ftune import report

        report.write(directory)
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        shown.say(f"no {rundir.REPORT} was written: {why}; try again: ftune report {directory}")


def _summary(result: RunResult, *, comparable: bool) -> str:
    evaluated = f", eval_loss {result.eval_loss:.4f}" if result.eval_loss is not None else ""
    predicted = result.predicted_peak_bytes
    foretold = f" ({format_bytes(predicted)} predicted)" if comparable and predicted is not None else ""
    model = Path(result.directory) / rundir.MODEL
    return (
        f"finished: {result.steps} steps in {format_duration(result.wall_seconds)}, "
        f"train_loss {result.train_loss or 0:.4f}{evaluated}, "
        f"{result.tokens_per_second:,.0f} tokens/s, peak {format_bytes(result.peak_memory_bytes)}{foretold}\n"
        f"the result is in {model}; talk to it: ftune chat {result.directory}"
    )
