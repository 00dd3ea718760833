"""MeZO's step over all weights, or over the most sensitive ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ftune.fused.rounding import Kind
from ftune.plugin import Setting
from ftune.zeroth.calibration import Scope, most_sensitive
from ftune.zeroth.entries import InPlace
from ftune.zeroth.log import Entry, Header, Writer, chosen_by, float32
from ftune.zeroth.modules import ThroughModules
from ftune.zeroth.points import Points, step_seed
from ftune.zeroth.rest import DenseAndSparse, Rest, layers_to_quantise

_OWN = "zeroth_order"
"""Its key in the state dict."""


class ZerothOrder(torch.optim.Optimizer):
    """Malladi et al. (2023), algorithm 1, with the perturbation undone exactly.

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps);  theta -= lr (g z + decay theta)

    `learn` measures g, `step` moves. The step is taken with the float32 values that are logged, so that a replay of the
    log is exact.
    """

    calibration_batches = 0
    """How many batches `calibrate` wants before the first step."""

    def __init__(
        self, groups: list[dict[str, Any]], *, learning_rate: float, eps: float, rounding: Kind, setting: Setting
    ) -> None:
        super().__init__(groups, {"lr": learning_rate, "weight_decay": 0.0})
        if setting.model is None:
            raise ValueError("a zeroth-order optimizer needs the model, not only its weights")
        self._weights = [weight for group in self.param_groups for weight in group["params"]]
        for weight in self._weights:
            weight.data = weight.data.contiguous()  # z is drawn in the order of flat places
        self._decays = [float(group["weight_decay"]) for group in self.param_groups for _ in group["params"]]
        self._eps, self._seed, self._clip = eps, setting.seed, setting.max_grad_norm
        self._points = Points(rounding)
        self._model = setting.model
        named = {id(weight): name for name, weight in setting.model.named_parameters()}
        self._names = tuple(named[id(weight)] for weight in self._weights)
        self._site = self._make_site(setting.model)
        self.steps = self.skipped = 0
        self.grad_norm = 0.0
        """|g| of the last step, before clipping."""
        self._pending: Entry | None = None
        self._log = self._make_log(setting, rounding)

    def _make_site(self, model: torch.nn.Module) -> ThroughModules | InPlace:
        return ThroughModules(model, self._weights, self._points)

    def _make_log(self, setting: Setting, rounding: Kind) -> Writer | None:
        if setting.directory is None or _rank() != 0:
            return None
        return Writer(setting.directory, self._header(rounding))

    def _header(self, rounding: Kind) -> Header:
        return Header(rounding, self._names, tuple(self._decays))

    @property
    def _chosen(self) -> list[torch.Tensor | None]:
        """Which entries of each weight move, as flat places in what the model holds; None where all of them do."""
        return self._site.chosen if isinstance(self._site, InPlace) else [None] * len(self._weights)

    @property
    def _places(self) -> list[torch.Tensor | None]:
        """The same as flat places in the weights that the run began with."""
        return self._chosen

    @torch.no_grad()
    def learn(self, loss_of: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the mean of the losses at the two points, a 0-dim float64 tensor.

        Where one of them is not finite the other is returned and the step will be skipped; where both are not, so is
        what is returned.
        """
        seed = step_seed(self._seed, self.steps)
        losses = torch.stack([self._loss_at(seed, distance, loss_of) for distance in (self._eps, -self._eps)])
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(losses, src=0)  # one bit of difference would part the ranks for good
        plus, minus = losses.tolist()
        rate = float32(self._rate())
        if math.isfinite(plus) and math.isfinite(minus):
            gradient = (plus - minus) / (2 * self._eps)
            self.grad_norm = abs(gradient)
            if self._clip > 0:
                gradient = max(-self._clip, min(self._clip, gradient))
            self._pending = Entry(seed, float32(gradient), rate)
            return losses.mean()
        self._pending = Entry(seed, 0.0, 0.0)
        self.grad_norm = 0.0
        self.skipped += 1
        return losses[0] if math.isfinite(plus) else losses[1]

    def _loss_at(self, seed: int, distance: float, loss_of: Callable[[], torch.Tensor]) -> torch.Tensor:
        torch.clear_autocast_cache()  # it may hold 16-bit copies of the weights at another point
        try:
            return self._site.measure(loss_of, seed=seed, distance=distance).detach().double()
        finally:
            torch.clear_autocast_cache()

    def _rate(self) -> float:
        rates = {float(group["lr"]) for group in self.param_groups}
        if len(rates) > 1:
            raise ValueError("a zeroth-order step has one learning rate for all weights")
        return rates.pop()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the weights as `learn` found, and log it; without a `learn` before it, do nothing."""
        entry, self._pending = self._pending, None
        if entry is None:
            return
        if entry.rate:
            for number, (weight, places, decay) in enumerate(
                zip(self._weights, self._chosen, self._decays, strict=True)
            ):
                self._points.move(
                    weight.data,
                    places,
                    seed=entry.seed,
                    number=number,
                    gradient=entry.gradient,
                    rate=entry.rate,
                    decay=decay,
                )
        if self._log is not None:
            self._log.append(self.steps, entry, self._places)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), _OWN: self._own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Kept apart from torch's state by weight, which is cast to the weight's dtype: indices would be made bfloat16.
        super().load_state_dict({key: value for key, value in state_dict.items() if key != _OWN})
        self._load_own_state(state_dict[_OWN])

    def _own_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "skipped": self.skipped}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.steps, self.skipped, self._pending = int(state["steps"]), int(state["skipped"]), None


class SparseZerothOrder(ZerothOrder):
    """The same over the entries whose squared gradients are largest, which never change after the first step.

    With `rest`, the other entries of linear layers are held in few bits from then on. `mask` is the directory of a run
    whose choice is taken.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        learning_rate: float,
        eps: float,
        rounding: Kind,
        density: float,
        calibration_batches: int,
        scope: Scope,
        setting: Setting,
        rest: Rest | None = None,
        mask: Path | None = None,
    ) -> None:
        self._density, self._scope, self._rest, self._mask = density, scope, rest, mask
        # All entries need no choosing, and a choice that was made no batches.
        self.calibration_batches = 0 if density == 1 else 1 if mask is not None else calibration_batches
        self._settled: list[torch.Tensor | None] = []
        super().__init__(groups, learning_rate=learning_rate, eps=eps, rounding=rounding, setting=setting)

    @property
    def _is_sparse(self) -> bool:
        return self._density < 1

    def _header(self, rounding: Kind) -> Header:
        return Header(rounding, self._names, tuple(self._decays), sparse=self._is_sparse, rest=self._rest)

    def _make_site(self, model: torch.nn.Module) -> InPlace:
        return InPlace(self._weights, self._points)

    @property
    def _places(self) -> list[torch.Tensor | None]:
        return self._settled or self._chosen

    def calibrate(self, losses: Callable[[], Iterator[torch.Tensor]]) -> None:
        """Choose the entries that move, from the gradients of some losses; every call of `losses` yields them anew.

        With several ranks the first one chooses, from its own batches.
        """
        found: list[torch.Tensor] | None = None
        if _rank() == 0:
            if self._mask is not None:
                found = chosen_by(self._mask, self._names, self._weights)
            else:
                found = most_sensitive(self._weights, losses, density=self._density, scope=self._scope)
        self._settle(self._shared(found), {})

    def _settle(self, places: list[torch.Tensor], codes: dict[int, dict[str, torch.Tensor]]) -> None:
        """Let these entries move, and hold the others in few bits: codes made before, or made now."""
        self._settled = [*places]
        self._site.chosen[:] = places
        self.calibration_batches = 0
        if self._rest is None:
            return
        for number, name, linear in [*layers_to_quantise(self._model, self._weights, self._rest)]:
            known = self._rest.codes_of(codes[number], linear) if codes else None
            made = known or self._rest.codes(linear.weight, places[number])
            self._model.set_submodule(name, DenseAndSparse(linear, places[number], made))
            self._site.chosen[number] = None

    def _shared(self, found: list[torch.Tensor] | None) -> list[torch.Tensor]:
        if not (distributed.is_available() and distributed.is_initialized()):
            assert found is not None
            return found
        device = self._weights[0].device
        counts = torch.tensor([len(places) for places in found] if found else [0] * len(self._weights), device=device)
        distributed.broadcast(counts, src=0)
        shared = found or [
            torch.empty(int(count), dtype=torch.int32, device=weight.device)
            for count, weight in zip(counts.tolist(), self._weights, strict=True)
        ]
        for places in shared:
            distributed.broadcast(places, src=0)
        return shared

    def learn(self, loss_of: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.calibration_batches:
            raise RuntimeError("calibrate() chooses the entries that move, before the first step")
        return super().learn(loss_of)

    def _own_state(self) -> dict[str, Any]:
        codes = {}
        if self._rest is not None:
            numbers = {id(weight): number for number, weight in enumerate(self._weights)}
            layers = [module for module in self._model.modules() if isinstance(module, DenseAndSparse)]
            codes = {numbers[id(layer.weight)]: self._rest.state(layer.codes) for layer in layers}
        return {**super()._own_state(), "chosen": list(self._settled), "codes": codes}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        super()._load_own_state(state)
        if state["chosen"]:
            places = [each.to(weight.device) for each, weight in zip(state["chosen"], self._weights, strict=True)]
            self._settle(places, state["codes"])


def _rank() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
