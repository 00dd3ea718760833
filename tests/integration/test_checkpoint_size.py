"""The room that a checkpoint is said to need, against what it takes: every optimizer, every way of tuning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe, rows_file

import ftune
from ftune import plugin
from ftune.errors import RecipeError
from ftune.plugin import Gradients
from ftune.training import checkpoint

OPTIONS: dict[str, dict[str, Any]] = {
    name: {"rank": 8} for name in plugin.names(plugin.OPTIMIZERS) if name.startswith(("galore", "apollo"))
}
OPTIONS |= {"sparse_mezo": {"density": 0.25, "calibration_batches": 1}, "sgd": {"momentum": 0.9}}
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora_and_full": {"r": 4},
    "hift": {"mixed": True},
    "lisa": {"activated_layers": 1},
    "badam": {},
    "qlora": {"r": 4},
    "qalora": {"r": 4, "group_size": 16, "fit": "minmax"},
    "vera": {"r": 16},
}
ONE_OF_EACH = ["adamw_torch", "adamw_8bit", "adafactor", "sgd", "galore_adamw", "lomo", "adalomo"]
"""For each kind of state: of the weights' dtype, in blocks, in factors, as options say, projected, and by the group."""
OFTEN = ["adamw_8bit", "lomo"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24)


def said_and_written(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, Path]:
    """Return the bytes that the state of a checkpoint and the weights were said to take, and the checkpoint."""
    said: list[tuple[int, int]] = []
    check = checkpoint.check_room

    def noted(directory: Path, *, checkpoint_bytes: int, model_bytes: int, **more: Any) -> None:
        said.append((checkpoint_bytes - model_bytes, model_bytes))
        check(directory, checkpoint_bytes=checkpoint_bytes, model_bytes=model_bytes, **more)

    monkeypatch.setattr(checkpoint, "check_room", noted)
    run = Path(ftune.train(values).directory)
    return *said[0], run / "checkpoints" / "checkpoint-5"


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        # The tables by which 8 bits are read are the same for all tensors, and saved once: 1 kB each.
        for key, inner in value.items():
            yield from () if str(key).startswith("qmap") else tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors(inner)


def state_of(folder: Path) -> int:
    """Return the bytes of all tensors of a saved state but single numbers, such as counts of steps."""
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    return sum(tensor.nbytes for tensor in tensors(state) if tensor.ndim)


def test_every_way_of_tuning_is_here() -> None:
    assert {*TUNINGS, "full"} == set(plugin.names(plugin.TUNINGS))


def compare(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    state, weights, folder = said_and_written(values, monkeypatch)
    assert state_of(folder) == pytest.approx(state, rel=0.01)
    (kept,) = folder.glob("*.safetensors")
    # Beside the tensors a file has their names and places: a few hundred bytes each.
    assert weights <= kept.stat().st_size <= weights + 300 * 80
    assert state <= (folder / "optimizer.pt").stat().st_size <= state + 1500 * 80 + 8 * 1024


def values_of(model: Path, rows: Path, output: Path, optim: str, dtype: str, tuning: dict[str, Any]) -> dict[str, Any]:
    training = {"optim": optim, "optim_args": OPTIONS.get(optim, {}), "max_steps": 5, "lr_scheduler_type": "constant"}
    training |= {"save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-4}
    return recipe(model, rows, output, model={"dtype": dtype}, tuning=tuning, training=training)


ALL = plugin.names(plugin.OPTIMIZERS)
QUICK = [("adamw_8bit", "float32"), ("adafactor", "float32"), ("adamw_torch", "bfloat16")]
CASES = [
    pytest.param(optim, dtype, marks=() if (optim, dtype) in QUICK else pytest.mark.slow)
    for optim in ALL
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(("optim", "dtype"), CASES)
def test_every_optimizer(
    optim: str, dtype: str, tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in plugin.optimizer(optim).needs:
        pytest.importorskip(package)
    compare(values_of(tiny_model, rows, tmp_path / "run", optim, dtype, {}), monkeypatch)


@pytest.mark.parametrize(
    "optim", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in ONE_OF_EACH]
)
@pytest.mark.parametrize("method", TUNINGS)
def test_every_tuning(
    method: str, optim: str, tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights of 16 bits, where some ways of tuning move copies of 32."""
    values = values_of(tiny_model, rows, tmp_path / "run", optim, "bfloat16", {"method": method, **TUNINGS[method]})
    if plugin.tuning(method).rotates and plugin.optimizer(optim).gradients is not Gradients.KEPT:
        with pytest.raises(RecipeError):
            ftune.train(values)
        return
    compare(values, monkeypatch)


@pytest.mark.slow
def test_codes_of_weights_that_rest(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = values_of(tiny_model, rows, tmp_path / "run", "sparse_mezo", "float32", {})
    values["training"]["optim_args"] = {**OPTIONS["sparse_mezo"], "rest_bits": 4, "rest_group_size": 16}
    compare(values, monkeypatch)
