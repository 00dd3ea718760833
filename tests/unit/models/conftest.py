from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that may be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "spoilt"))


@pytest.fixture
def hush(capfd: pytest.CaptureFixture[str]) -> Callable[[], None]:
    """Return a check that nothing was printed."""

    def check() -> None:
        out, err = capfd.readouterr()
        assert (out, err) == ("", "")

    return check
