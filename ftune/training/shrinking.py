"""A step that runs out of memory is made again in smaller passes, where the recipe asks for it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch

from ftune.training.meter import Meter
from ftune.training.moving import MovingTrainer
from ftune.training.passes import Batch, Passes, lengths_of, ran_out_of_memory

PASSES = "in forward and backward"
MOVING = "moving the weights"
EVALUATING = "evaluating"


@dataclass
class Doing:
    """What a run is about, for the message if it runs out of memory."""

    what: str = ""
    """Empty between steps."""
    step: int = 0
    batch: Batch | None = None
    passes: int = 1


@dataclass
class _Step:
    """A step as it began, and what it has taken since."""

    random: torch.Tensor
    random_of_gpu: torch.Tensor | None
    window: torch.Tensor
    """Of the meter."""
    taken: list[Batch] = field(default_factory=list)


class ShrinkingTrainer(MovingTrainer):
    """Computes each micro-batch in one pass, or in as many as memory has room for.

    The loader's batches stay what they were, and so do the order of rows, the count of steps and the tokens that a
    step's loss is divided by.
    """

    meter: Meter
    passes: Passes | None = None
    """None where each batch is computed in one."""
    _begun: _Step | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.doing = Doing()
        super().__init__(*arguments, **named)

    @abstractmethod
    def count(self, loss: torch.Tensor, batch: Batch) -> None:
        """Count a micro-batch, given its share of the step's loss."""

    def get_batch_samples(self, *arguments: Any) -> Any:
        """Take the micro-batches of a step, which is thereby a new one."""
        self._begun = None
        return super().get_batch_samples(*arguments)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return one micro-batch's share of the step's loss; with its last one all ranks have the step's gradients."""
        self.doing = Doing(PASSES, self._step_number, inputs)
        if self.passes is None:
            loss = self.one_pass(model, inputs, num_items_in_batch)
            self.count(loss, inputs)
        else:
            loss = self._in_passes(self.passes, model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.average_gradients()
            self.meter.end_step()
            self.doing = Doing(MOVING, self._step_number)
        return loss

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        self.doing = Doing()
        super()._maybe_log_save_evaluate(*arguments, **named)

    @property
    def _step_number(self) -> int:
        return int(self.state.global_step) + 1

    def _in_passes(self, passes: Passes, model: Any, inputs: Batch, num_items: Any) -> torch.Tensor:
        if self._begun is None:
            self._begun = self._beginning()
        self._begun.taken.append(inputs)
        waiting = [inputs]
        while True:
            loss = self._learned(passes, model, waiting, num_items)
            if loss is None:
                now = self.doing.passes
                lengths = ", ".join(map(str, lengths_of(self.doing.batch or inputs)))
                why = f"step {self._step_number} had no memory for rows of {lengths} tokens"
                passes.more(self._step_number, 2 * now, f"{why} at once" if now == 1 else f"{why} in {now} passes")
            elif not self._others_make_more(passes):
                return loss
            self._begin_again(model, self._begun)
            waiting = self._begun.taken

    def _learned(self, passes: Passes, model: Any, batches: list[Batch], num_items: Any) -> torch.Tensor | None:
        """Add the gradients of micro-batches and return the last one's loss; None where memory is too small for it."""
        try:
            return self._learn(passes, model, batches, num_items)
        except (RuntimeError, MemoryError) as error:
            assert self.doing.batch is not None
            now = self.doing.passes
            parts, smaller = (passes.split(self.doing.batch, count) for count in (now, 2 * now))
            may = self.recipe.training.on_out_of_memory == "shrink" and ran_out_of_memory(error)
            if not may or len(smaller) == len(parts):
                raise
        # Outside of the handler nothing holds on to the frames of the failed pass, and what it computed is freed.
        return None

    def _learn(self, passes: Passes, model: Any, batches: list[Batch], num_items: Any) -> torch.Tensor:
        count = passes.at(self._step_number)
        for batch in batches:
            self.doing = Doing(PASSES, self._step_number, batch, count)
            parts = [batch] if count == 1 else passes.split(batch, count)
            loss = torch.stack([self.one_pass(model, part, num_items) for part in parts]).sum()
            self.count(loss, batch)
        return loss

    def _others_make_more(self, passes: Passes) -> bool:
        """Return whether this rank has to make its step again, as another had to make more passes than it has made.

        All ranks go on with the same number, so that a run that is resumed knows it. Inside a step none waits for
        another: gradients are averaged at its end.
        """
        if self.accelerator.num_processes == 1 or not self.accelerator.sync_gradients:
            return False
        mine = passes.at(self._step_number)
        while True:
            both = torch.tensor([mine, -mine], device=self.args.device)
            torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
            most, fewest = int(both[0]), -int(both[1])
            if mine < most:
                why = f"another rank had no memory for its rows of step {self._step_number}"
                passes.more(self._step_number, most, why)
                return True
            if fewest == most:
                return False

    def _beginning(self) -> _Step:
        on_gpu = self.args.device.type == "cuda"
        random_of_gpu = torch.cuda.get_rng_state(self.args.device) if on_gpu else None
        return _Step(torch.get_rng_state(), random_of_gpu, self.meter.window.clone())

    def _begin_again(self, model: Any, begun: _Step) -> None:
        """Forget what was learned of a step: its gradients, what was counted, and the random numbers drawn."""
        model.zero_grad(set_to_none=True)
        self.meter.window.copy_(begun.window)
        torch.set_rng_state(begun.random)
        if begun.random_of_gpu is not None:
            torch.cuda.set_rng_state(begun.random_of_gpu, self.args.device)
            torch.cuda.empty_cache()  # blocks of the sizes that were too large
