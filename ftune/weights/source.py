"""What a finished run made, as an export takes it: opened without its weights, loaded only where they fit."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ftune.errors import MachineError, Problem, RecipeError
from ftune.machine import free_bytes
from ftune.models.finished import Finished, check_base, finished_tokenizer, load_finished, of_run, spec_of
from ftune.models.source import Say, check_weights, config_of, refuse_pickles, silent, source_directory
from ftune.resolve.spec import RunSpec
from ftune.units import format_bytes
from ftune.weights import files
from ftune.weights.folded import Computable, InMemory, Streamed, Weights
from ftune.weights.layerwise import computing
from ftune.weights.skeleton import NotStreamable

_SPARE_BYTES = 1 << 30
"""Left to the rest of the machine, and to activations and logits of the prompts that are compared."""


class Source:
    """A run's model: its files, its tokenizer, and its weights in whatever way they can be had."""

    def __init__(self, run_directory: Path, *, free_bytes: int | None = None, say: Say = silent) -> None:
        """Refuse a run without a finished model, damaged files, and an adapter of another base.

        `free_bytes` is the memory that may be used; None asks the system.
        """
        self.run_directory = run_directory
        self.found = of_run(run_directory)
        self.name = self.found.model.model_name_or_path
        self.say = say
        self.folder = Path(source_directory(self.found.model, say))
        self.config = config_of(self.folder, self.name)
        self.free_bytes = free_bytes
        for folder, name in ((self.folder, self.name), (self.found.folder, str(self.found.folder))):
            refuse_pickles(folder, name)
            files.check(folder)
        check_weights(self.folder, self.name)
        check_base(self.found)
        self.tokenizer = finished_tokenizer(self.found)

    def with_result(self, found: Finished) -> Source:
        """Return the same run, with another adapter on the same base."""
        other = copy.copy(self)
        other.found = found
        for name in ("streamed", "weights", "_loaded"):
            other.__dict__.pop(name, None)
        return other

    @property
    def has_adapter(self) -> bool:
        return self.found.base is not None

    @cached_property
    def spec(self) -> RunSpec | None:
        """What the run was told to do; None where its `run.json` is gone."""
        return spec_of(self.run_directory) if (self.run_directory / "run.json").is_file() else None

    @cached_property
    def stored_dtype(self) -> str:
        """What the weights, or those of an adapter's base, are stored in."""
        return files.stored_dtype(self.folder, self.config)

    @cached_property
    def parameters(self) -> int:
        """How many weights the files hold."""
        opened = files.Files(self.folder, self.name)
        return sum(math.prod(shape) for shape in opened.shapes.values())

    @cached_property
    def fits(self) -> bool:
        """Whether the model in float32 fits into the memory that is free now."""
        return 4 * self.parameters + _SPARE_BYTES < (free_bytes() if self.free_bytes is None else self.free_bytes)

    @cached_property
    def streamed(self) -> Streamed | NotStreamable:
        """The weights as read from the files tensor by tensor, or why they cannot be."""
        try:
            return Streamed(self.found, self.folder)
        except NotStreamable as error:
            return error

    def require_plain_weights(self) -> None:
        """Refuse weights stored in fewer bits: what training moved is smaller than their steps."""
        if "quantization_config" in self.config and not self.found.is_coded:
            why = "its weights are quantised, and adding the adapter to them would round most of it away"
            fix = (
                f"use the adapter on it as it is (`ftune export {self.run_directory} --format adapter`), or train one "
            )
            fix += f"on the unquantised weights of `{self.name}` and merge that"
            what = f"the adapter cannot be merged into its base `{self.name}`"
            raise RecipeError(Problem(rule="base-quantised", what=what, why=why, fix=fix))

    @contextlib.contextmanager
    def computing(self) -> Iterator[tuple[Any, str]]:
        """Yield the model in float32 with its adapter beside it, and in which way it computes."""
        if self.fits:
            yield self._loaded, "in memory"
            if isinstance(self.streamed, Streamed):
                del self._loaded  # nothing else needs the whole model
            return
        if isinstance(self.streamed, NotStreamable):
            needed = format_bytes(4 * self.parameters + _SPARE_BYTES)
            what = f"`{self.name}` needs {needed} of free memory in float32"
            why = f"it cannot be read layer by layer: {self.streamed}"
            raise MachineError(Problem("out-of-memory", what, why=why, fix="use a machine with more memory"))
        with computing(self.streamed) as model:
            yield model, "layer by layer"

    @cached_property
    def _loaded(self) -> Any:
        return load_finished(self.found, dtype="float32", say=self.say)

    @cached_property
    def weights(self) -> Weights:
        """The whole weights, an adapter folded in; call `computing` before, since folding changes a loaded model."""
        if isinstance(self.streamed, Streamed):
            return self.streamed
        self.say(f"merging in memory: {self.streamed}")
        return InMemory(self.taken())

    @contextlib.contextmanager
    def computing_whole(self) -> Iterator[Any]:
        """Yield the model in float32 with the weights that a format is given."""
        if isinstance(self.weights, Streamed):
            with computing(Computable(self.weights)) as model:
                yield model
        else:
            yield self.weights.model
            del self.weights  # made anew when it is asked for: writing takes the memory

    def taken(self) -> Any:
        """Return the model in float32 with its adapter beside it, for the caller to change."""
        return self.__dict__.pop("_loaded", None) or load_finished(self.found, dtype="float32")
