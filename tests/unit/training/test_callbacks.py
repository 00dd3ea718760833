"""Signals and logs as a run meets them, without training."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ftune.rundir import read_whole_lines
from ftune.training import progress
from ftune.training.callbacks import MetricsLog, StopOnRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_ends_at_once(number: signal.Signals, capsys: Any) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stop = StopOnRequest()
    with stop.listening(), stop.between_steps():
        os.kill(os.getpid(), number)
        assert stop.requested
        assert "once more to stop at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_the_steps_the_first_signal_ends_at_once(number: signal.Signals) -> None:
    with StopOnRequest().listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


LINES: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 3.0},
    {"step": 2, "loss": 2.0},
    {"step": 4, "loss": 1.5},
    {"step": 4, "eval_loss": 1.6},
    {"step": 6, "loss": 1.0},
]


@pytest.mark.parametrize(("evaluated", "kept"), [(True, LINES[:4]), (False, LINES[:3])])
def test_metrics_beyond_the_checkpoint_are_forgotten(
    evaluated: bool, kept: list[dict[str, Any]], tmp_path: Path
) -> None:
    log = MetricsLog(tmp_path, progress.Silent())
    log.forget_after(4, evaluated=evaluated)
    assert not log.path.exists()
    log.path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 7, "lo')
    log.forget_after(4, evaluated=evaluated)
    assert read_whole_lines(log.path) == kept
    assert log.path.read_text().endswith("}\n")
