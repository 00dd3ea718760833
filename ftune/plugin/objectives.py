"""What is minimised: the facts of an objective."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from ftune.plugin.base import Plugin


class Objective(Plugin):
    """What is minimised."""

    formats: ClassVar[frozenset[str]]
    """Names of the data formats it can learn from."""

    @abstractmethod
    def loss(
        self,
        model: Any,
        batch: dict[str, Any],
        *,
        num_items: Any,
        label_smoothing: float,
        options: Any,
        by_source: Any = None,
    ) -> Any:
        """Return the loss summed over trained tokens, divided by `num_items`.

        `by_source` (sources, 2) gathers each source's summed loss and trained tokens, for the metrics.
        """
