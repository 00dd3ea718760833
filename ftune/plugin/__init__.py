"""What a method is: five kinds of plugin, the facts each declares, and how they are found.

A plugin is a module whose name is the name in the recipe: `ftune/optimizers/sgd.py` is `optim: sgd`. Its module-level
`plugin` object declares facts, which the rules, the planner and the trainer read; none of them knows a method by name.
"""

from ftune.plugin.base import Plugin
from ftune.plugin.discovery import (
    EXPORTS,
    FORMATS,
    OBJECTIVES,
    OPTIMIZERS,
    TUNINGS,
    customary_learning_rate,
    export,
    format_named,
    get,
    names,
    objective,
    optimizer,
    tuning,
)
from ftune.plugin.exports import BEFORE_ROUNDING, Export, Tolerance
from ftune.plugin.formats import Conversation, Finding, Format, PlainText, RowError, Turn
from ftune.plugin.objectives import Objective
from ftune.plugin.optimizers import Gradients, Optimizer, Setting, Sharding, TrainedTensor
from ftune.plugin.tunings import Batches, StateBytes, Tuning, no_batches

__all__ = [
    "BEFORE_ROUNDING",
    "EXPORTS",
    "FORMATS",
    "OBJECTIVES",
    "OPTIMIZERS",
    "TUNINGS",
    "Batches",
    "Conversation",
    "Export",
    "Finding",
    "Format",
    "Gradients",
    "Objective",
    "Optimizer",
    "PlainText",
    "Plugin",
    "RowError",
    "Setting",
    "Sharding",
    "StateBytes",
    "Tolerance",
    "TrainedTensor",
    "Tuning",
    "Turn",
    "customary_learning_rate",
    "export",
    "format_named",
    "get",
    "names",
    "no_batches",
    "objective",
    "optimizer",
    "tuning",
]
