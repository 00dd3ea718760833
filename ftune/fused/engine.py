"""Updates made inside backward: a hook on each weight moves it once its gradient is whole, and frees the gradient.

Never are all gradients alive, only the one that is being used and those that autograd holds for tensors to come. The
hook fires after accumulation, once for a tied weight (`register_post_accumulate_grad_hook`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import distributed

from ftune.fused.adafactor import AddUp
from ftune.fused.gathered import Gathered, Place
from ftune.fused.interleave import interleave
from ftune.fused.kept import RuleOptimizer, local
from ftune.fused.rounding import Kind
from ftune.fused.rule import Rule
from ftune.options import FusedOptions
from ftune.plugin import Setting

_SCALE_AT_FIRST = 2.0**16
_GOOD_STEPS = 1000
"""After so many steps without overflow the loss scale doubles."""

Accumulate = Literal["forward", "buffer"] | None


class _Mode(enum.Enum):
    OFF = "a backward that is not the optimizer's own: gradients are left where they are"
    GATHER = "add to a buffer"
    MEASURE = "take the norm, and throw the gradient away"
    UPDATE = "move the weight"


class FusedBackward(RuleOptimizer):
    """Moves weights inside `backward`.

    Clipping by the global norm needs the norm of all gradients before the first weight moves, so backward runs twice
    over one graph: once to measure, once to update. So it does with a scaled loss (float16), where an overflow must be
    known before anything is touched. `accumulate` says what becomes of micro-batches: `forward` keeps their graphs and
    runs one backward over all of them, `buffer` adds their gradients up in bfloat16 or on the host.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rule: Rule,
        *,
        learning_rate: float,
        seed: int,
        rounding: Kind = "stochastic",
        max_grad_norm: float = 0.0,
        clip_value: float | None = None,
        clip_each_norm: float | None = None,
        scales_loss: bool = False,
        accumulate: Accumulate = None,
        buffer: Place = "bfloat16",
        add_up: AddUp | None = None,
    ) -> None:
        super().__init__(groups, rule, learning_rate=learning_rate, seed=seed, rounding=rounding)
        self.add_up = add_up
        """Returns the sum over ranks that each have some rows of every weight; None where they have whole weights."""
        self.max_grad_norm, self.clip_value, self.clip_each_norm = max_grad_norm, clip_value, clip_each_norm
        self.accumulate = accumulate
        self.scale = _SCALE_AT_FIRST if scales_loss else None
        """What the loss is multiplied by; None where small gradients do not vanish."""
        self.good_steps = 0
        self.skipped = False
        """Whether the last step overflowed and moved nothing."""
        self.grad_norm: torch.Tensor | float = 0.0
        """Of the last step, before clipping."""
        self._gathered = Gathered(buffer, seed + 1)
        self._waiting: list[torch.Tensor] = []
        self._mode = _Mode.OFF
        self._norms: dict[int, torch.Tensor] = {}
        """Of each gradient as it came, by the number of its weight; measured once in a step."""
        self._factor: torch.Tensor | None = None
        numbers = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        self._hooks = [
            weight.register_post_accumulate_grad_hook(self._hook(index, numbers[index]))
            for index, (weight, _) in enumerate(self.weights())
        ]

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """Take one micro-batch's share of the loss; at the `last` of a step, move the weights."""
        if not last and self.accumulate is None:
            raise RuntimeError("gradients consumed inside backward cannot be accumulated")
        scaled = loss if self.scale is None else loss * self.scale
        if self.accumulate == "buffer":
            self._run(_Mode.GATHER, [scaled])
            if last:
                self._settle(self._over_gathered)
            return
        self._waiting.append(scaled)
        if last:
            losses, self._waiting = self._waiting, []
            if len(losses) > 1:
                interleave(losses)
            self._settle(lambda mode, again: self._run(mode, losses, retain_graph=again))

    @property
    def measures_first(self) -> bool:
        """Whether a step has to know all gradients before the first weight moves."""
        return self.max_grad_norm > 0 or self.scale is not None

    def step(self, closure: Any = None) -> None:
        """Close the step; the weights have moved already."""
        self.steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: no gradient is left."""

    def remove(self) -> None:
        """Take the hooks off the weights."""
        for hook in self._hooks:
            hook.remove()

    def own_state(self) -> dict[str, Any]:
        return {**super().own_state(), "scale": self.scale, "good_steps": self.good_steps}

    def load_own_state(self, state: dict[str, Any]) -> None:
        super().load_own_state(state)
        self.scale, self.good_steps = state["scale"], state["good_steps"]

    def _settle(self, run: Callable[[_Mode, bool], None]) -> None:
        """Measure where that is needed, then update."""
        self._factor = None
        if self.measures_first:
            run(_Mode.MEASURE, True)
            self.grad_norm = self._total_norm()
            if self._overflowed():
                self._gathered.clear()
                self._norms = {}
                return
            self._factor = self._clip_factor()
        run(_Mode.UPDATE, False)
        if not self.measures_first:
            self.grad_norm = self._total_norm()
        self._norms = {}

    def _run(self, mode: _Mode, losses: Sequence[torch.Tensor], retain_graph: bool = False) -> None:
        self._mode = mode
        try:
            torch.autograd.backward(losses, retain_graph=retain_graph)
        finally:
            self._mode = _Mode.OFF

    @torch.no_grad()
    def _over_gathered(self, mode: _Mode, again: bool) -> None:
        for index, (weight, group) in enumerate(self.weights()):
            gradient = self._gathered.take(weight, keep=again)
            if gradient is not None:
                self._use(mode, index, weight, gradient, group)

    def _hook(self, index: int, group: int) -> Callable[[torch.Tensor], None]:
        """Return the hook of one weight; its group is looked up by number, since loading a state makes new ones."""

        @torch.no_grad()
        def hook(weight: torch.Tensor) -> None:
            if self._mode is _Mode.OFF or weight.grad is None:
                return
            gradient, weight.grad = local(weight.grad), None
            if self._mode is _Mode.GATHER:
                self._gathered.add(weight, gradient, step=self.steps, index=index)
            else:
                self._use(self._mode, index, weight, gradient, self.param_groups[group])

        return hook

    def _use(
        self, mode: _Mode, index: int, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        if self.add_up is None and distributed.is_initialized() and (ranks := distributed.get_world_size()) > 1:
            # Summed, then divided: gloo knows no mean. Every rank gets the same bits, so replicas stay equal.
            distributed.all_reduce(gradient)
            gradient.div_(ranks)
        if index not in self._norms:
            self._norms[index] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            if self.add_up is not None and self.clip_each_norm is not None:
                self._norms[index] = self.add_up(self._norms[index].square()).sqrt()
        if mode is _Mode.UPDATE:
            self.move(index, weight, self._clipped(gradient, self._norms[index]), group)

    def _clipped(self, gradient: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Return the gradient without the loss scale, and clipped; `norm` is its own, as it came."""
        if self._factor is not None:
            # float16 could not hold what a scaled gradient is without its scale.
            gradient = gradient.float() if gradient.dtype == torch.float16 else gradient
            gradient = gradient.mul_(self._factor)
            norm = norm * self._factor
        if self.clip_value is not None:
            gradient = gradient.clamp_(-self.clip_value, self.clip_value)
        if self.clip_each_norm is not None:
            gradient = gradient.mul_((self.clip_each_norm / (norm + 1e-6)).clamp_(max=1.0))
        return gradient

    def _total_norm(self) -> torch.Tensor:
        if not self._norms:
            return torch.zeros(())
        # In the order of the weights, as clip_grad_norm_ adds them up, and not in that of backward.
        norms = [norm for _, norm in sorted(self._norms.items())]
        stacked = torch.stack([each.to(norms[0].device) for each in norms])
        if self.add_up is not None and self.clip_each_norm is None:
            stacked = self.add_up(stacked.square()).sqrt()  # each is of this rank's rows
        norm = torch.linalg.vector_norm(stacked)
        return norm if self.scale is None else norm / self.scale

    def _clip_factor(self) -> torch.Tensor:
        """Return what each gradient is multiplied by, as `clip_grad_norm_` has it."""
        factor = torch.ones_like(self.grad_norm)
        if self.max_grad_norm > 0:
            factor = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp_(max=1.0)
        return factor if self.scale is None else factor / self.scale

    def _overflowed(self) -> bool:
        """Return whether a scaled loss was too large; the scale is halved then, and grows after good steps."""
        if self.scale is None:
            return False
        self.skipped = not bool(torch.isfinite(self.grad_norm))
        if self.skipped:
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
        else:
            self.good_steps += 1
            if self.good_steps % _GOOD_STEPS == 0:
                self.scale *= 2
        return self.skipped


def fused(
    groups: list[dict[str, Any]], rule: Rule, learning_rate: float, options: FusedOptions, setting: Setting
) -> FusedBackward:
    """Return a rule inside backward with the options that every such optimizer has."""
    return FusedBackward(
        groups,
        rule,
        learning_rate=learning_rate,
        # Ranks that round other rows of a weight than each other draw other numbers for them.
        seed=setting.seed if setting.add_up is None else setting.seed * 1009 + setting.rank,
        rounding=options.rounding,
        max_grad_norm=setting.max_grad_norm,
        clip_value=options.clip_grad_value,
        clip_each_norm=options.clip_grad_norm_per_tensor,
        scales_loss=setting.scales_loss,
        accumulate=options.accumulate,
        buffer=options.buffer,
        add_up=setting.add_up,
    )
