"""The shape of a rule: a row over facts, with a failing and a passing example that are its test and its documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ftune import plugin
from ftune.errors import Severity
from ftune.machine import Machine
from ftune.recipe.schema import Recipe


@dataclass(frozen=True)
class Facts:
    """What a rule may look at: the recipe beside its chosen plugins and, when known, the machine."""

    recipe: Recipe
    machine: Machine | None = None

    @property
    def optimizer(self) -> plugin.Optimizer:
        return plugin.optimizer(self.recipe.optimizer.method)

    @property
    def tuning(self) -> plugin.Tuning:
        return plugin.tuning(self.recipe.tuning.method)

    @property
    def objective(self) -> plugin.Objective:
        return plugin.objective(self.recipe.objective.method)

    @property
    def device_type(self) -> str:
        return self.machine.device_type if self.machine else "cuda"

    def words(self) -> dict[str, Any]:
        """Return what the texts of a rule may name in braces."""
        training, data = self.recipe.training, self.recipe.data
        missing = [name for name in self.optimizer.needs + self.tuning.needs + self.objective.needs if not self._has(name)]
        return {
            "optim": self.recipe.optimizer.method,
            "tuning": self.recipe.tuning.method,
            "objective": self.recipe.objective.method,
            "format": data.format,
            "formats": ", ".join(sorted(self.objective.formats)),
            "batch": training.per_device_train_batch_size,
            "accumulation": training.gradient_accumulation_steps,
            "effective": training.per_device_train_batch_size * training.gradient_accumulation_steps,
            "zero_stage": self.recipe.distributed.zero_stage,
            "device_note": self.optimizer.device_notes.get(self.device_type, ""),
            "missing": " ".join(missing),
            "packages": " ".join(name.replace("_", "-") for name in missing),
            "attention": self.recipe.model.attn_implementation,
        }

    def _has(self, package: str) -> bool:
        return self.machine is None or self.machine.has(package)


@dataclass(frozen=True)
class Rule:
    """One thing that cannot work, or that a user should know."""

    id: str
    at: str
    """Dotted key the caret points at."""
    when: Callable[[Facts], bool]
    what: str
    because: str
    instead: str
    bad: Mapping[str, Mapping[str, Any]]
    good: Mapping[str, Mapping[str, Any]]
    severity: Severity = "error"
    also: tuple[tuple[str, str], ...] = ()
    """Other keys that take part, each with what to say beside it."""
    label: str = ""
    needs: Literal["recipe", "machine"] = "recipe"
    bad_machine: Machine = field(default_factory=Machine)
    """For machine rules: a machine on which `bad` fails (and `good` passes)."""
