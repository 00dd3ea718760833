"""What happens around steps: metrics, samples, stopping on request, and where checkpoints fall."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ftune import rundir
from ftune.training.progress import Progress

LOGGED = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "peak_memory_bytes",
    "passes_per_batch",
)


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Appends a JSON object per logged step to `metrics.jsonl`, and shows it."""

    def __init__(self, directory: Path, progress: Progress) -> None:
        self.path = directory / rundir.METRICS
        self.progress = progress

    def forget_after(self, step: int, *, evaluated: bool) -> None:
        """Drop what a stopped run logged beyond the checkpoint it goes on from: it will be logged again.

        `evaluated` says whether the evaluation at that very step came before the checkpoint or after it.
        """
        if self.path.exists():
            lines = rundir.read_whole_lines(self.path)
            kept = [
                line for line in lines if line["step"] < step or (line["step"] == step and _before(line, evaluated))
            ]
            rundir.write_lines(self.path, kept)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.progress.start(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.progress.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        what = "eval_loss" if "eval_loss" in logs else "loss"
        names = ("eval_loss",) if what == "eval_loss" else LOGGED
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)}
        # JSON has no NaN: an infinite norm, such as fp16's first steps have, is null.
        line |= {name: logs[name] if math.isfinite(logs[name]) else None for name in names if name in logs}
        by_source = {name.partition("/")[2]: value for name, value in logs.items() if name.startswith(f"{what}/")}
        if by_source:
            line[f"{what}_by_source"] = by_source
        line["time"] = round(time.time(), 3)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        seconds = logs.get("seconds_per_step")
        left = None if seconds is None else seconds * (state.max_steps - state.global_step)
        self.progress.show(line, state.max_steps, left)


def _before(line: dict[str, Any], evaluated: bool) -> bool:
    return evaluated or "eval_loss" not in line


class SaveAfterEvaluation(TrainerCallback):  # type: ignore[misc]
    """Moves a save at the last step of an epoch behind that epoch's evaluation.

    Otherwise a run resumed from it would skip the evaluation, and with it a best loss or an early stop.
    """

    def __init__(self) -> None:
        self.postponed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if control.should_save and args.eval_strategy == "epoch" and _epoch_is_over(state):
            control.should_save, self.postponed = False, True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.postponed:
            control.should_save, self.postponed = True, False
        return control


def _epoch_is_over(state: Any) -> bool:
    return float(state.epoch or 0.5).is_integer()


class StopOnRequest(TrainerCallback):  # type: ignore[misc]
    """The first Ctrl-C (or SIGTERM) ends the run after its current step, saved; a second one ends it at once.

    Outside the steps, while a run loads or writes its result, the first one ends it at once. In a launch a signal may
    come twice, from the launcher and from a batch system that signals every process: there SIGUSR1 alone is the second.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self.launched = launched
        self.stepping = False
        self.requested = False
        self.stopped = False
        self.process = os.getpid()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take both signals; outside the main thread Python allows no handler."""
        previous = {}
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if self.launched else []))
            previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Stop after a step, not at once, inside the block."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False

    def _on_signal(self, number: int, frame: Any) -> None:
        forked = os.getpid() != self.process  # a worker of a loader, which its parent ends
        if forked and not self.stepping:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.requested and self.launched and number != signal.SIGUSR1:
            return
        elif self.requested or not self.stepping or number == signal.SIGUSR1:
            raise KeyboardInterrupt
        self.requested = True
        if not forked:
            print("\nstopping after this step, and saving; once more to stop at once", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self._everywhere(args) and not control.should_training_stop:
            self.stopped = True
            if not _epoch_is_over(state):
                control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.stopped and _epoch_is_over(state):  # with the evaluation that is due now
            control.should_save = control.should_training_stop = True
        elif self.stopped:  # the epoch was left, not finished: its evaluation belongs to the resumed run
            control.should_evaluate = control.should_save = False
        return control

    def _everywhere(self, args: Any) -> bool:
        """Agree on it: a rank that stopped alone would leave the others waiting for its gradients."""
        if args.world_size <= 1:
            return self.requested
        flag = torch.tensor([int(self.requested)], device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
