"""Folders that are there whole or not at all, and readable for whom the umask lets in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ftune import rundir


@pytest.fixture(params=[0o000, 0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("make", [rundir.whole_directory, rundir.new_directory])
def test_files_follow_the_umask_whoever_writes_them(
    make: Callable[[Path], AbstractContextManager[Path]], umask: int, tmp_path: Path
) -> None:
    with make(tmp_path / "made") as folder:
        (folder / "plain.txt").write_text("by Python")
        (folder / "inner").mkdir()
        for place in (folder, folder / "inner"):
            save_file({"x": torch.ones(3)}, place / "x.safetensors")
        (folder / "run.sh").touch(0o777)
    made = tmp_path / "made"
    modes = {str(path.relative_to(made)): path.stat().st_mode & 0o777 for path in made.rglob("*")}
    plain, open_to_run = 0o666 & ~umask, 0o777 & ~umask
    expected = dict.fromkeys(("plain.txt", "x.safetensors", "inner/x.safetensors"), plain)
    assert modes == {**expected, "inner": open_to_run, "run.sh": open_to_run}
