"""VeRA (Kopiczko et al., 2023, arXiv 2310.11454): two vectors beside each layer, around matrices that all share."""

from __future__ import annotations

from typing import Any

from ftune.adapters.options import VeRAOptions
from ftune.plugin import Batches, Tuning


class VeRA(Tuning):
    name = "vera"
    summary = "Two vectors a layer are trained, around one pair of random matrices that all layers share."
    has_adapter = True
    frozen_base = True
    default_learning_rate = 4e-3
    learning_rate_reason = "its authors' rate for instruction tuning: vectors move further than matrices"
    Options = VeRAOptions

    def apply(self, model: Any, options: Any, *, batches: Batches) -> Any:
        from ftune.adapters.vera import add_vera

        return add_vera(model, options)


plugin = VeRA()
