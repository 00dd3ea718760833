"""EVA (Paischer et al., 2024, arXiv 2410.07170): adapters start along the directions in which their inputs vary."""

from __future__ import annotations

from typing import Any

from ftune.adapters.options import AdapterOptions
from ftune.errors import Problem, RecipeError
from ftune.losses import IGNORED
from ftune.plugin import Batches


def start(adapted: Any, batches: Batches, options: AdapterOptions) -> None:
    """Set A to the first right-singular vectors of each layer's inputs, and share ranks out by explained variance.

    Only the positions of learned tokens count. A batch with fewer of them than directions is left out: PEFT would
    skip it in silence, and wait for ever where all are so.
    """
    from peft import initialize_lora_eva_weights

    ranks = [options.r, *options.rank_pattern.values()]
    needed = max(round(rank * options.eva_rho) for rank in ranks)
    held = list(batches(options.eva_batches))
    if any("labels" not in batch for batch in held):
        what = "EVA looks at rows of one text, and these have several"
        raise RecipeError(Problem("eva-batches", what, fix="set init_lora_weights: true"))
    fit = [batch for batch in held if int((batch["labels"] != IGNORED).sum()) >= needed]
    if not fit:
        most = max((int((batch["labels"] != IGNORED).sum()) for batch in held), default=0)
        what = f"EVA needs {needed} learned tokens in a batch, and the fullest of {len(held)} has {most}"
        fix = "raise per_device_train_batch_size, or lower r or eva_rho"
        raise RecipeError(Problem("eva-batches", what, why="it looks for r * eva_rho directions in them", fix=fix))
    # Every rank looks at the same batches: there is nothing to gather.
    initialize_lora_eva_weights(
        adapted, fit, forward_fn=_forward, gather_distributed_inputs=False, show_progress_bar=False
    )


def _forward(model: Any, batch: dict[str, Any]) -> Any:
    return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
