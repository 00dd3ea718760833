"""How methods are found by their names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from typing import Any

from ftune.plugin.exports import Export
from ftune.plugin.formats import Format
from ftune.plugin.objectives import Objective
from ftune.plugin.optimizers import Optimizer
from ftune.plugin.tunings import Tuning

OPTIMIZERS, TUNINGS, OBJECTIVES, FORMATS, EXPORTS = "optimizers", "tuning", "objectives", "formats", "exports"


def _modules(package: str) -> Iterable[str]:
    root = importlib.import_module(f"ftune.{package}")
    return sorted(found.name for found in pkgutil.iter_modules(root.__path__) if not found.name.startswith("_"))


@cache
def names(package: str) -> tuple[str, ...]:
    """Return the names of all plugins of one kind, without importing them."""
    return tuple(_modules(package))


@cache
def get(package: str, name: str) -> Any:
    """Return one plugin; KeyError where there is none of that name."""
    if name not in names(package):
        raise KeyError(name)
    return importlib.import_module(f"ftune.{package}.{name}").plugin


def optimizer(name: str) -> Optimizer:
    return get(OPTIMIZERS, name)  # type: ignore[no-any-return]


def tuning(name: str) -> Tuning:
    return get(TUNINGS, name)  # type: ignore[no-any-return]


def objective(name: str) -> Objective:
    return get(OBJECTIVES, name)  # type: ignore[no-any-return]


def customary_learning_rate(optimizer: Optimizer, tuning: Tuning) -> tuple[float, str]:
    """Return the learning rate that `auto` stands for, and why."""
    if tuning.default_learning_rate is None:
        return optimizer.default_learning_rate, optimizer.learning_rate_reason
    if tuning.has_adapter and optimizer.default_adapter_learning_rate is not None:
        return optimizer.default_adapter_learning_rate, optimizer.adapter_learning_rate_reason
    factor = optimizer.default_learning_rate / Optimizer.default_learning_rate
    rate, why = tuning.default_learning_rate * factor, tuning.learning_rate_reason
    return (rate, why) if factor == 1 else (rate, f"{why}, times {factor:g}: {optimizer.learning_rate_reason}")


def export(name: str) -> Export:
    return get(EXPORTS, name)  # type: ignore[no-any-return]


def format_named(name: str) -> Format:
    return get(FORMATS, name)  # type: ignore[no-any-return]
