"""An optimizer that moves some of the weights at each step, and frees those that move at the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from ftune.rotation.part import Build, Groups, Part
from ftune.rotation.plans import Plan
from ftune.rotation.units import Unit

Asleep = Literal["host", "drop"]
"""What becomes of the state of weights that stop moving: kept in host memory, or dropped, so that they start anew."""


class RotatingOptimizer(torch.optim.Optimizer):  # type: ignore[misc]
    """Optimizers of several parts, of which a plan chooses those that step.

    Only the weights of the coming step require a gradient: backward makes no other, and goes no deeper than the lowest
    of them. A step that is left out, as after an overflow of float16, does not advance the plan.
    """

    def __init__(self, parts: list[Part], plan: Plan, *, asleep: Asleep, steps_per_rate: int = 1) -> None:
        self.parts, self.plan, self.asleep = parts, plan, asleep
        self.steps_per_rate = steps_per_rate
        """So many steps share a learning rate."""
        super().__init__([group for part in parts for group in part.shown], {})
        self._free_active()

    @property
    def active(self) -> list[Part]:
        """The parts that the coming step moves."""
        return [self.parts[number] for number in self.plan.active]

    def follow(self, plan: Plan) -> None:
        """Move by another plan from now on."""
        self.plan = plan
        self._free_active()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the active parts, then free those of the next step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        before = self.active
        for part in before:
            part.step()
        self.plan.advance()
        after = self.active
        for part in before:
            if part not in after:
                part.set_free(False)
                self._put_to_sleep(part)
        for part in after:
            part.set_free(True)
        return loss

    def _put_to_sleep(self, part: Part) -> None:
        if self.asleep == "drop":
            part.forget()
        else:
            part.put_away()

    def _free_active(self) -> None:
        active = self.active
        for part in self.parts:
            part.set_free(part in active)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan's place, each part's state by its number, and the groups that a schedule sets."""
        states = {number: part.state_dict() for number, part in enumerate(self.parts)}
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        held = {number: state for number, state in states.items() if state is not None}
        return {"state": held, "param_groups": groups, "plan": self.plan.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        self.plan.load_state_dict(state_dict["plan"])
        self._free_active()
        for number, part in enumerate(self.parts):
            part.load_state_dict(state_dict["state"].get(number))
            if self.asleep == "host":
                part.put_away()


def parts_of(units: Iterable[Unit], groups: Groups, build: Build, *, with_masters: bool = False) -> list[Part]:
    """Return one part for each unit that has weights in the groups, whose settings its own groups keep."""
    found = []
    for unit in units:
        own = {id(weight) for weight in unit.weights}
        of_unit = [{**group, "params": [w for w in group["params"] if id(w) in own]} for group in groups]
        of_unit = [group for group in of_unit if group["params"]]
        if of_unit:
            found.append(Part(unit.name, of_unit, build, with_masters=with_masters))
    return found
