"""Trained weights from initial ones and the log: bit for bit, on the device type and PyTorch that trained them."""

from __future__ import annotations

from pathlib import Path

import torch

from ftune.errors import Problem, RunError
from ftune.zeroth.log import read, read_chosen
from ftune.zeroth.points import Points
from ftune.zeroth.rest import Rest, assembled, layers_to_quantise


@torch.no_grad()
def replay(model: torch.nn.Module, directory: Path, steps: int | None = None) -> int:
    """Take the steps of a run's log on its initial weights; return how many were taken.

    Only as many as `steps` where that is given. It costs one drawing of z for each step and weight, and no forward.
    Raises RunError where the log cannot be read, does not begin at the start or is too short, or the model has not
    its weights.
    """
    header, entries = read(directory)
    if header.first_step:
        raise _refused(f"the log begins at step {header.first_step}", "the steps before it were lost")
    if steps is not None and steps > len(entries):
        raise _refused(
            f"the log has {len(entries)} steps and not {steps}", "it was cut, or copied before the run ended"
        )
    named = dict(model.named_parameters())
    lacking = [name for name in header.names if name not in named]
    if lacking:
        raise _refused(f"the model has no weight `{lacking[0]}`", "it is not the one that the run began with")
    weights = [named[name].data for name in header.names]
    chosen = [
        None if places is None else places.to(weight.device)
        for places, weight in zip(read_chosen(directory, header), weights, strict=True)
    ]
    if header.rest is not None:
        parameters = [named[name] for name in header.names]
        for number, _, linear in layers_to_quantise(model, parameters, header.rest):
            _round(linear.weight, chosen[number], header.rest)
    points, taken = Points(header.rounding), entries[:steps]
    for entry in taken:
        if not entry.rate:
            continue
        for number, (weight, places, decay) in enumerate(zip(weights, chosen, header.decays, strict=True)):
            points.move(
                weight,
                places,
                seed=entry.seed,
                number=number,
                gradient=entry.gradient,
                rate=entry.rate,
                decay=decay,
            )
    return len(taken)


def _round(weight: torch.Tensor, places: torch.Tensor | None, rest: Rest) -> None:
    """Give a weight the values that it had while all but some of its entries were held in few bits."""
    assert places is not None
    values = weight.data.view(-1)[places.long()]
    weight.data.copy_(assembled(rest.codes(weight, places), places, values))


def _refused(what: str, why: str) -> RunError:
    return RunError(Problem("zeroth-order-log", what, why=why, fix="use the run's model or one of its checkpoints"))
