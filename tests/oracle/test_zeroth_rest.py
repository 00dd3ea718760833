"""Weights that rest in few bits: the same training as of the plain model with the values that they then have."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import losses as losses_of_run
from training_runs import recipe, rows_file, same_bits, weights
from zeroth_runs import batches, loss_of, made, same, small, take

import ftune
from ftune.cli.rebuild import rebuild
from ftune.errors import RecipeError, RunError
from ftune.machine import probe
from ftune.training import resuming
from ftune.training.run import train
from ftune.zeroth import log
from ftune.zeroth.replay import replay
from ftune.zeroth.rest import DenseAndSparse

_DTYPES = [torch.float32, torch.bfloat16]
_OPTIONS: dict[str, Any] = {"density": 0.3, "rest_bits": 4, "rest_group_size": 3}


def calibrated(model: torch.nn.Module, **more: Any) -> Any:
    optimizer = made(model, "sparse_mezo", **{**_OPTIONS, **more})
    optimizer.calibrate(lambda: (loss_of(model, tokens)() for tokens in batches(2)))
    return optimizer


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("bits_each", [2, 3, 4, 8])
def test_what_moves_is_exact_and_the_rest_is_on_its_grid(bits_each: int, dtype: torch.dtype) -> None:
    model = small(dtype)
    before = model.inner.weight.detach().clone()
    optimizer = calibrated(model, rest_bits=bits_each)
    assert isinstance(model.inner, DenseAndSparse)
    assert not isinstance(model.head, DenseAndSparse)  # its matrix is the embedding's
    dense, places = model.inner.dense(), model.inner.places.long()
    assert 0 < len(places) < dense.numel()
    assert torch.equal(dense.flatten()[places], before.flatten()[places])
    without = before.clone().float()
    without.view(-1)[places] = 0
    groups = without.view(6, 2, 3)
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits_each - 1)
    off = (dense.float() - before.float()).abs()
    off.view(-1)[places] = 0
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert (off.view(6, 2, 3) <= step[..., None] / 2 + rounding * before.abs().max()).all()
    for row in range(6):
        for group in range(2):
            still = torch.ones(36, dtype=torch.bool)
            still[places] = False
            values = dense.view(6, 2, 3)[row, group][still.view(6, 2, 3)[row, group]]
            assert len(values.unique()) <= 2**bits_each
    assert optimizer.calibration_batches == 0


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_training_is_that_of_the_plain_model_with_these_values(dtype: torch.dtype, tmp_path: Path) -> None:
    model, rows = small(dtype), batches(20)
    optimizer = calibrated(model, directory=tmp_path)
    take(optimizer, model, rows[:1])
    plain = small(dtype)
    start = small(dtype)
    replay(start, tmp_path, 0)
    plain.load_state_dict(start.state_dict())
    other = made(plain, "sparse_mezo", density=0.3, mask=str(tmp_path))
    other.calibrate(lambda: iter(()))
    take(other, plain, rows[:1])
    assert take(optimizer, model, rows[1:]) == take(other, plain, rows[1:])
    assert same(plain, restored(model, dtype))
    assert not same(plain, small(dtype))


def restored(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return the plain model that another program makes of what is saved."""
    plain = small(dtype)
    assert plain.load_state_dict(model.state_dict()).missing_keys == []
    return plain


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_what_is_saved_is_a_plain_model_that_says_the_same(dtype: torch.dtype) -> None:
    model, rows = small(dtype), batches(5)
    take(calibrated(model), model, rows)
    plain = restored(model, dtype)
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(rows[0]), plain(rows[0]))


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_replay_is_the_training(dtype: torch.dtype, tmp_path: Path) -> None:
    model, rows = small(dtype), batches(12)
    take(calibrated(model, directory=tmp_path), model, rows)
    again = small(dtype)
    assert replay(again, tmp_path) == 12
    assert same(again, restored(model, dtype))


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_a_resumed_run_is_the_whole_one(dtype: torch.dtype, tmp_path: Path) -> None:
    rows, model = batches(20), small(dtype)
    first = calibrated(model)
    take(first, model, rows[:10])
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, tmp_path / "saved.pt")
    take(first, model, rows[10:])
    found = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = small(dtype)
    resumed.load_state_dict(found["model"])
    second = made(resumed, "sparse_mezo", **_OPTIONS)
    second.load_state_dict(copy.deepcopy(second.state_dict()))  # accelerate does so to move states to the device
    second.load_state_dict(found["optimizer"])
    assert second.calibration_batches == 0
    take(second, resumed, rows[10:])
    assert same(restored(resumed, dtype), restored(model, dtype))
    # A checkpoint loaded into a model that rests already, as the best one is at the end.
    model.load_state_dict(found["model"])
    assert same(restored(model, dtype), restored(small_at(found["model"], dtype), dtype))


def small_at(state: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    model = small(dtype)
    model.load_state_dict(state)
    return model


def test_the_rest_takes_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False), torch.nn.Linear(512, 4, bias=False))
    optimizer = made(model, "sparse_mezo", density=0.001, rest_bits=4, rest_group_size=64)
    inputs = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    optimizer.calibrate(lambda: iter([model(inputs).square().mean()]))
    state = optimizer.state_dict()["zeroth_order"]["codes"]
    held = sum(value.nbytes for value in state[0].values() if isinstance(value, torch.Tensor))
    groups = 256 * 512 / 64
    assert held == 256 * 512 / 2 + 2 * 4 * groups
    assert model[0].weight.numel() < 256 * 512 / 100


class TestRefused:
    def test_groups_that_do_not_divide(self) -> None:
        with pytest.raises(RecipeError, match="4 does not divide the 6 inputs of `inner`"):
            calibrated(small(), rest_group_size=4)

    def test_no_layer_is_left(self) -> None:
        model = small()
        model.inner.requires_grad_(False)
        with pytest.raises(RecipeError, match="no linear layer"):
            calibrated(model)

    def test_everything_moves(self) -> None:
        with pytest.raises(RecipeError, match="no weight rests"):
            made(small(), "sparse_mezo", density=1.0, rest_bits=4)

    def test_a_choice_for_other_weights(self, tmp_path: Path) -> None:
        model = small()
        model.norm.requires_grad_(False)
        take(calibrated(model, directory=tmp_path), model, batches(1))
        with pytest.raises(RunError, match="chose no entries of `norm"):
            made(small(), "sparse_mezo", mask=str(tmp_path)).calibrate(lambda: iter(()))

    def test_no_choice_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="cannot be read"):
            made(small(), "sparse_mezo", mask=str(tmp_path)).calibrate(lambda: iter(()))


def test_a_run_resumed_rebuilt_and_its_choice_taken_again(tiny_model: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl", 16)
    options = {"density": 0.05, "calibration_batches": 2, "rest_bits": 4, "rest_group_size": 16}
    settings = {"optim": "sparse_mezo", "optim_args": options, "learning_rate": 1e-2, "max_steps": 6}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    run = ftune.train(recipe(tiny_model, rows, tmp_path / "run", training=settings))
    halted = shutil.copytree(run.directory, tmp_path / "copy")
    shutil.rmtree(halted / "model")
    shutil.rmtree(halted / "checkpoints" / "checkpoint-6")
    (halted / "result.json").unlink()
    continued = resuming.reopen(halted, (), probe())
    train(continued.spec, plain=True, checkpoint=continued.checkpoint)
    assert same_bits(weights(halted), weights(run.directory))
    assert losses_of_run(halted) == losses_of_run(run.directory)
    rebuild(Path(run.directory), tmp_path / "again", None)
    (tmp_path / "again").rename(tmp_path / "model")
    assert same_bits(weights(tmp_path), weights(run.directory))
    masked = {**settings, "optim_args": {**options, "mask": str(run.directory)}}
    second = ftune.train(recipe(tiny_model, rows, tmp_path / "second", training=masked))
    assert same_bits(weights(second.directory), weights(run.directory))
    assert log.read(Path(second.directory))[1] == log.read(Path(run.directory))[1]
