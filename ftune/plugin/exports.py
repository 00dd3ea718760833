"""What other tools load: the facts of an export format."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ftune.plugin.base import Plugin


@dataclass(frozen=True)
class Tolerance:
    """How far an export may be from what it was made of."""

    measure: Literal["largest logit difference", "mean KL"]
    limit: float
    """Of the difference of a logit, or of the mean Kullback-Leibler divergence in nats."""

    def holds(self, difference: float, divergence: float) -> bool:
        """Return whether both are numbers and the measured one is within the limit."""
        found = difference if self.measure == "largest logit difference" else divergence
        return found <= self.limit and math.isfinite(difference + divergence)

    def __str__(self) -> str:
        return f"{self.limit:g} in {self.measure}"


BEFORE_ROUNDING = Tolerance("mean KL", 1e-6)
"""What sums in another order make of weights in float32 with the adapter folded in, before a format rounds them.

SmolLM2-135M shows 1e-8, and 7e-5 where the adapter of a single v_proj is lost.
"""


class Export(Plugin):
    """Files that other tools load, made of what a run ended with.

    `source` is a `ftune.weights.source.Source`: whole weights tensor by tensor (`source.weights`), or the files.
    """

    read_by: ClassVar[str]
    """What reads the result: "plain transformers"."""
    tolerances: ClassVar[Mapping[str, Tolerance | None]]
    """Each type that weights can be stored in, by the name that `--dtype` takes, and how far it may be off; None where
    that is told and not judged, which only one in `rounds` may say."""
    rounds: ClassVar[frozenset[str]] = frozenset()
    """Those of the types whose rounding may move answers further than a part of the adapter does, that was lost.

    So the whole weights are compared with the run's model before they are rounded, and `check_rounding` is asked.
    """
    shards: ClassVar[bool] = False
    """Whether weights are spread over files of at most `max_shard_size`; elsewhere nobody may ask for one."""
    refuses: ClassVar[str] = ""
    """What cannot be written so, for the documentation."""

    def default_dtype(self, source: Any) -> str:
        """Return what weights are stored in where nothing is said."""
        return str(source.stored_dtype)

    def bytes_needed(self, source: Any, dtype: str) -> int:
        """Return about how many bytes will be written."""
        bits = {"float32": 32, "bfloat16": 16, "float16": 16, "q8_0": 8.5}
        return int(source.parameters * bits[dtype] / 8)

    def check(self, source: Any) -> None:
        """Raise RecipeError for a source that cannot be written so, before anything is loaded."""

    @abstractmethod
    def write(self, source: Any, folder: Path, *, dtype: str, max_shard_size: str) -> None:
        """Write the files into an empty folder; `max_shard_size`, as 5GB, is for formats with shards."""

    def check_rounding(self, source: Any, folder: Path, model: Any, *, dtype: str) -> None:
        """Raise RunError where a written weight is not the rounding of the whole one; `model` is from `computing`.

        Only asked for a type in `rounds`.
        """
        raise NotImplementedError

    @abstractmethod
    def computing(self, source: Any, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
        """Return a context with the model as its files say, in float32, and in which way it computes."""
