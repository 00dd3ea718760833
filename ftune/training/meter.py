"""What is counted between two lines of metrics; saved with each checkpoint, so that a resumed run logs the same."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch


class Meter:
    """Sums since the last logged line, and over the whole run; losses stay on the device until they are read."""

    def __init__(self, device: torch.device, sources: tuple[str, ...] = ()) -> None:
        self.sources = sources
        """Names of the sources whose losses are told apart."""
        self.window = torch.zeros(3 + 2 * len(sources), dtype=torch.float64, device=device)
        """Since the last line, of this rank: summed step losses, tokens, supervised tokens, and for each source its
        summed loss and learned tokens."""
        self.window_steps = 0
        self.total_loss = 0.0
        self.total_steps = 0
        self.tokens = 0
        self.supervised_tokens = 0
        self.seconds = 0.0
        """Training time of the whole run, without evaluation, saving and samples."""
        self._window_began = 0.0
        self._since = time.perf_counter()

    def add(self, loss: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        """Count one micro-batch; `loss` is its share of the step's loss. `end_step` closes the step."""
        tokens = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        self.window[0] += loss.double()
        self.window[1] += tokens
        self.window[2] += (batch["labels"] != -100).sum()

    @property
    def by_source(self) -> torch.Tensor | None:
        """The part of the window that a loss adds to, (sources, 2)."""
        return self.window[3:].view(-1, 2) if self.sources else None

    def end_step(self) -> None:
        self.window_steps += 1

    def start_clock(self) -> None:
        self._since = time.perf_counter()

    def stop_clock(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def read(self, reduce: Any, ranks: int) -> dict[str, float]:
        """Close the window and return its line: mean loss per step, token counts and the run's token rate."""
        summed = reduce(self.window.clone())
        self.stop_clock()
        loss, tokens, supervised, *rest = summed.tolist()
        loss /= ranks
        steps = max(1, self.window_steps)
        self.total_loss += loss
        self.total_steps += self.window_steps
        self.tokens += int(tokens)
        self.supervised_tokens += int(supervised)
        seconds, self._window_began = self.seconds - self._window_began, self.seconds
        self.window.zero_()
        self.window_steps = 0
        return {
            **losses_by_source(self.sources, rest, "loss"),
            "loss": loss / steps,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "tokens_per_second": round(tokens / seconds, 1) if seconds > 0 else 0.0,
        }

    def state(self) -> dict[str, Any]:
        """Return everything as JSON-able numbers; float64 survives JSON exactly."""
        return {
            "window": self.window.tolist(),
            "window_steps": self.window_steps,
            "total_loss": self.total_loss,
            "total_steps": self.total_steps,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        values = dict(state)
        self.window.copy_(torch.tensor(values.pop("window"), dtype=torch.float64))
        for name, value in values.items():
            setattr(self, name, value)
        self._window_began = self.seconds
        self.start_clock()


def losses_by_source(names: tuple[str, ...], sums: list[float], what: str) -> dict[str, float]:
    """Return the mean loss of each source that was seen, as `loss/NAME`; `sums` are pairs of loss and tokens."""
    pairs = zip(names, sums[::2], sums[1::2], strict=True)
    return {f"{what}/{name}": loss / tokens for name, loss, tokens in pairs if tokens}


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process ever held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
