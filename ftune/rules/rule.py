"""The shape of a rule: a row over facts, whose failing and passing examples are its test and its documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ftune import plugin
from ftune.errors import Severity
from ftune.machine import Machine
from ftune.places import PACKAGE, locate, meant_as_data_file, meant_as_model_folder
from ftune.recipe.schedules import steps_of_decay
from ftune.recipe.schema import Recipe, listed
from ftune.rules.attention import FLASH, Flash


@dataclass(frozen=True)
class Facts:
    """What a rule may look at: the recipe beside its chosen plugins and, when known, the machine."""

    recipe: Recipe
    machine: Machine | None = None
    given: frozenset[str] = frozenset()
    """Dotted keys that the recipe or `--set` names, so that a default is not taken for a wish."""
    beside: Path = Path()
    """The recipe's own folder, from which relative paths may count."""

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
    def format(self) -> plugin.Format | None:
        """The format of the rows, where the recipe names it."""
        name = self.recipe.data.format
        return None if name == "auto" else plugin.format_named(name)

    @property
    def flash(self) -> Flash | None:
        """The kind of flash attention asked for."""
        return FLASH.get(self.recipe.model.attn_implementation)

    def wants(self, key: str) -> bool:
        """Return whether the recipe gives a key a value."""
        section, name = key.split(".")
        return key in self.given and getattr(getattr(self.recipe, section), name) is not None

    @property
    def model_is_local(self) -> bool:
        """Whether the model is in a package or a folder, rather than on a hub."""
        name = self.recipe.model.model_name_or_path
        found = locate(name, self.beside)
        return name.startswith(PACKAGE) or meant_as_model_folder(name) or (found is not None and found.is_dir())

    def rows_are_on_a_hub(self, key: str) -> bool:
        """Return whether `data.train` or `data.eval` names a data set of a hub, where there are splits."""
        names = [source.path for source in listed(getattr(self.recipe.data, key))]
        return any(not meant_as_data_file(name) and locate(name, self.beside) is None for name in names)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, as it will be."""
        rate = self.recipe.training.learning_rate
        return plugin.customary_learning_rate(self.optimizer, self.tuning)[0] if rate == "auto" else float(rate)

    @property
    def trackers(self) -> list[str]:
        """The trackers asked for."""
        return self.recipe.training.trackers

    @property
    def device_type(self) -> str:
        return self.machine.device_type if self.machine else "cuda"

    def words(self) -> dict[str, Any]:
        """Return what the texts of a rule may name in braces."""
        training, data = self.recipe.training, self.recipe.data
        missing = [
            name for name in self.optimizer.needs + self.tuning.needs + self.objective.needs if not self._has(name)
        ]
        return {
            "optim": self.recipe.optimizer.method,
            "tuning": self.recipe.tuning.method,
            "split_note": self.tuning.split_note,
            "objective": self.recipe.objective.method,
            "format": data.format,
            "formats": ", ".join(sorted(self.objective.formats)),
            "device_note": self.optimizer.device_notes.get(self.device_type, ""),
            "missing": " ".join(missing),
            "packages": " ".join(name.replace("_", "-") for name in missing),
            "attention": self.recipe.model.attn_implementation,
            "trackers": ", ".join(self.missing_trackers()),
            "tracker_packages": " ".join(name.replace("_", "-") for name in self.missing_trackers()),
            "steps": training.max_steps,
            "steps_of_schedule": steps_of_decay(
                training.lr_scheduler_kwargs, training.warmup_steps, training.max_steps
            ),
            "learning_rate": f"{self.learning_rate:g}",
            "max_tokens": training.max_tokens_per_batch,
            "max_length": data.max_length,
            "loss_setting": self._loss_setting(),
            "loss_rule": self._loss_rule(),
            "flash_package": self.flash.package if self.flash else "",
            "flash_install": self.flash.install if self.flash else "",
            **self._machine_words(),
        }

    def _machine_words(self) -> dict[str, str]:
        machine = self.machine or Machine()
        torch, count = machine.packages.get("torch", ""), len(machine.gpus)
        return {
            "torch": torch,
            "torch_install": machine.torch_install,
            "unknown_device": machine.unknown_device,
            "devices": f"{count} GPU{'s' if count > 1 else ''}" if count else "the processor",
        }

    def missing_trackers(self) -> list[str]:
        """Return the trackers whose package, which has the same name, is not installed."""
        return [name for name in self.trackers if not self._has(name)]

    def _loss_setting(self) -> str:
        if self.format is None or self.format.trains_whole_text:
            return "no setting"
        return self.format.loss_setting

    def _loss_rule(self) -> str:
        if self.format is not None and self.format.trains_whole_text:
            return "every token of plain text is learned"
        return f"{self._loss_setting()} says what is learned of them"

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
    good_machine: Machine | None = None
    """Where no recipe helps: the machine on which `good` passes instead."""
