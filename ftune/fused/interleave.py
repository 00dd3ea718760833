"""The order in which autograd walks several graphs at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def interleave(losses: Sequence[torch.Tensor]) -> None:
    """Let one backward over several losses go through their graphs side by side, layer by layer.

    Autograd takes the youngest node first, which is all of the last graph before any of the first: every gradient would
    be alive until its last share came. Numbered by their distance from their own loss, nodes of the same layer are
    neighbours, and a gradient is whole before the next one begins. Only the order changes, not what is computed.
    """
    graphs = [_nodes(loss) for loss in losses]
    for place, nodes in enumerate(graphs):
        youngest = max((node._sequence_nr() for node in nodes), default=0)
        for node in nodes:
            distance = youngest - node._sequence_nr()
            node._set_sequence_nr(_OF_A_LOSS - distance * len(graphs) + place)


_OF_A_LOSS = 1 << 40
"""Far above what nodes have by themselves, so that none of them falls below zero."""


def _nodes(loss: torch.Tensor) -> list[Any]:
    """Return the nodes of a graph, without those that gather a leaf's gradient: they run as soon as they can."""
    found: dict[Any, None] = {}
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in found or hasattr(node, "variable"):
            continue
        found[node] = None
        stack += [following for following, _ in node.next_functions]
    return list(found)
