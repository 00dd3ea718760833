"""Folders that are whole or absent, and checkpoints that are what was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ftune import rundir
from ftune.recipe.schema import Training
from ftune.training import checkpoint


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _KilledError(BaseException):
    """Ends a block as a Ctrl-C would: it is no Exception."""


def fill_half(final: Path, error: BaseException) -> None:
    existing = final.exists()
    with rundir.whole_directory(final) as folder:
        (folder / "weights").write_text("half")
        assert final.exists() == existing
        raise error


@pytest.mark.parametrize("error", [OSError("no space left"), _KilledError()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_that_fails_is_as_it_was(error: BaseException, existing: bool, tmp_path: Path) -> None:
    final = tmp_path / "model"
    if existing:
        final.mkdir()
        (final / "weights").write_text("old")
    before = content(tmp_path)
    with pytest.raises(type(error)):
        fill_half(final, error)
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if existing else [])


def test_a_whole_folder_replaces_the_old_one_and_what_was_left(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for leftover in (final, tmp_path / "model.partial"):
        leftover.mkdir()
        (leftover / "old").write_text("old")
    with rundir.whole_directory(final) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text("new")
    assert content(tmp_path) == {"model/inner/weights": b"new"}


def flipped(path: Path) -> None:
    before = path.stat()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flipped, "is not what was written"),
    "half of it": (lambda path: path.write_bytes(path.read_bytes()[:50]), "has 50 bytes instead of 100"),
    "none of it": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "inner/rng_state.pth"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_any_file_is_noticed(kind: str, name: str, tmp_path: Path) -> None:
    for file in ("model.safetensors", "optimizer.pt", "inner/rng_state.pth"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(bytes(range(100)))
    assert checkpoint.damage(tmp_path) == "its manifest cannot be read"
    checkpoint.seal(tmp_path)
    assert checkpoint.damage(tmp_path) is None
    damage, said = DAMAGES[kind]
    damage(tmp_path / name)
    assert checkpoint.damage(tmp_path) == f"{name} {said}"
    (tmp_path / checkpoint.MANIFEST).write_text("{")
    assert checkpoint.damage(tmp_path) == "its manifest cannot be read"


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    steps = {"a best one": [4, 10, 12], "the best among the newest": [10, 12], "one more": [12]}
    checkpoint.prune(tmp_path, keep=None, best=None)
    assert len(rundir.checkpoints(tmp_path)) == 4
    for (keep, best), left in zip([(2, 4), (2, 10), (1, None)], steps.values(), strict=True):
        kept = tmp_path / "checkpoints" / f"checkpoint-{best}" if best else None
        checkpoint.prune(tmp_path, keep=keep, best=kept)
        assert [int(path.name.rpartition("-")[2]) for path in rundir.checkpoints(tmp_path)] == left


@pytest.mark.parametrize(
    ("settings", "steps", "saves"),
    [
        ({"save_strategy": "no"}, 1000, 0),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, 1000, 3),
        ({"save_steps": 400}, 1000, 3),
        ({"save_steps": 500}, 1000, 2),
        ({"save_steps": 0.1}, 1000, 10),
        ({"save_steps": 0.0001}, 1000, 1000),
    ],
)
def test_planned_saves(settings: dict[str, object], steps: int, saves: int) -> None:
    assert checkpoint.planned_saves(Training(output_dir="o", **settings), steps) == saves  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "saves", "needed"),
    [
        (None, 7, 7 * 30 + 10),
        (2, 7, 4 * 30 + 10),  # two, the best one, and the one that is being written
        (2, 1, 30 + 10),
        (2, 0, 10),
    ],
)
def test_room_for_checkpoints_and_result(keep: int | None, saves: int, needed: int) -> None:
    assert checkpoint.room_needed(checkpoint_bytes=30, model_bytes=10, keep=keep, saves=saves) == needed
