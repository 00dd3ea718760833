"""Every optimizer in whole runs: it learns, goes on after a stop to the same bits, and two ranks do what one does."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import losses, metrics, recipe, rows_file, same_bits, weights

import ftune
from ftune import plugin
from ftune.errors import RecipeError, RunError
from ftune.machine import probe
from ftune.plugin import Gradients
from ftune.rotation.optimizer import RotatingOptimizer
from ftune.training import resuming, run

RATES = {"sgd": 0.3, "lomo": 0.3, "adalomo": 2e-2}
"""Where a few steps on a tiny model need another rate than 3e-3."""
LEARNERS = [name for name in plugin.names(plugin.OPTIMIZERS) if plugin.optimizer(name).gradients is not Gradients.NONE]
FUSED = [name for name in LEARNERS if plugin.optimizer(name).gradients is Gradients.FUSED]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 32)


def settings_of(optim: str, **more: Any) -> dict[str, Any]:
    return {"optim": optim, "learning_rate": RATES.get(optim, 3e-3), **more}


@pytest.mark.parametrize("optim", LEARNERS)
def test_every_optimizer_learns(optim: str, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    values = recipe(tiny_model, rows, tmp_path / "run", training=settings_of(optim, num_train_epochs=3))
    found = losses(ftune.train(values).directory)
    assert sum(found[-4:]) < 0.95 * sum(found[:4])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optim", plugin.names(plugin.OPTIMIZERS))
def test_a_stopped_run_goes_on_to_the_same_bits(
    optim: str, dtype: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    values = recipe(
        tiny_model,
        rows,
        tmp_path / "run",
        model={"dtype": dtype},
        training=settings_of(optim, save_strategy="steps", save_steps=4, lr_scheduler_type="cosine"),
    )
    whole = Path(ftune.train(values).directory)
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(stopped / "model")
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-8")
    (stopped / "result.json").unlink()
    continued = resuming.reopen(stopped, (), probe())
    assert continued.checkpoint is not None
    assert continued.checkpoint.name == "checkpoint-4"
    run.train(continued.spec, checkpoint=continued.checkpoint)
    assert same_bits(weights(whole), weights(stopped))
    assert losses(whole) == losses(stopped)


TURNS = [name for name in plugin.names(plugin.TUNINGS) if plugin.tuning(name).rotates]


@pytest.mark.parametrize("method", TURNS)
def test_weights_that_rest_at_the_end_are_looked_at_before_they_are_saved(
    method: str, tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that is not a number, and in no loss yet, with the next turn begun already."""
    tuning = {"method": method, **({} if method == "hift" else {"interval": 1})}
    values = recipe(tiny_model, rows, tmp_path / "run", tuning=tuning, training={"max_steps": 3})
    whole_step, steps = RotatingOptimizer.step, itertools.count(1)

    def broken(self: RotatingOptimizer, *arguments: Any) -> Any:
        moving = self.active
        done = whole_step(self, *arguments)
        if next(steps) == 3:
            moving[0].weights[0].data.fill_(float("nan"))
        return done

    monkeypatch.setattr(RotatingOptimizer, "step", broken)
    with pytest.raises(RunError, match="not numbers"):
        ftune.train(values)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("optim", FUSED)
def test_the_gradient_norm_in_the_metrics_is_the_true_one(
    optim: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    found = []
    for name in (optim, "adamw_torch"):
        values = recipe(tiny_model, rows, tmp_path / name, training={"optim": name, "max_steps": 1})
        found.append(metrics(ftune.train(values).directory)[0]["grad_norm"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] > 0.1


@pytest.mark.parametrize("how", ["forward", "buffer"])
def test_accumulated_steps_are_those_of_whole_batches(how: str, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    whole = recipe(tiny_model, rows, tmp_path / "whole", training=settings_of("lomo", per_device_train_batch_size=8))
    parts = settings_of("lomo", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    parts |= {"optim_args": {"accumulate": how, "buffer": "host"}, "gradient_checkpointing": True}
    other = recipe(tiny_model, rows, tmp_path / "parts", training=parts)
    one, two = ftune.train(whole).directory, ftune.train(other).directory
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, rtol=1e-5, atol=1e-6)


def test_accumulation_is_refused_with_the_ways_there_are(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    values = recipe(tiny_model, rows, tmp_path / "run", training=settings_of("lomo", gradient_accumulation_steps=2))
    with pytest.raises(RecipeError) as caught:
        ftune.train(values)
    (problem,) = caught.value.problems
    assert problem.rule == "fused-gradients-are-not-accumulated"
    assert "accumulate: forward" in problem.fix
    assert "accumulate: buffer" in problem.fix


PROJECTED = [name for name in plugin.names(plugin.OPTIMIZERS) if "rank" in plugin.optimizer(name).Options.model_fields]
"""Run at a rank below the width of every matrix, and with new projections on the way."""
TOGETHER = [pytest.param(name, {}) for name in FUSED if name not in PROJECTED]
TOGETHER += [pytest.param(name, {"rank": 8, "update_proj_gap": 2}, marks=pytest.mark.slow) for name in PROJECTED]


@pytest.mark.parametrize(("optim", "options"), TOGETHER)
def test_two_ranks_are_one_with_both_halves(
    optim: str, options: dict[str, Any], tiny_model: Path, rows: Path, tmp_path: Path, launched: Any
) -> None:
    shared = settings_of(optim, optim_args=options, learning_rate=RATES.get(optim, 3e-3) / 10, max_steps=4)
    alone = recipe(tiny_model, rows, tmp_path / "one", training={**shared, "per_device_train_batch_size": 8})
    one = ftune.train(alone).directory
    values = recipe(tiny_model, rows, tmp_path / "two", training={**shared, "per_device_train_batch_size": 4})
    launched(values, tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-6)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", TURNS)
def test_a_run_shorter_than_a_sweep_is_told_of(
    method: str, tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step; and not where every weight has its turn."""
    enough = {"hift": 4, "badam": 2, "lisa": 2}
    tuning = {"method": method, **({} if method == "hift" else {"interval": 1})}
    tuning |= {"activated_layers": 1} if method == "lisa" else {}
    for steps in (enough[method] - 1, enough[method]):
        output = tmp_path / f"{steps}"
        ftune.train(recipe(tiny_model, rows, output, tuning=tuning, training={"max_steps": steps}))
        said = capsys.readouterr().out
        before, _, _ = said.partition("step 1/")
        assert ("some weights will not have moved" in before) is (steps < enough[method])
        assert (f"train for {enough[method]} steps or more" in said) is (steps < enough[method])
