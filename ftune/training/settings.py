"""Hugging Face's settings of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ftune import rundir
from ftune.resolve import RunSpec


def settings_of(spec: RunSpec, **changes: Any) -> TrainingArguments:
    """Return the settings of a run, changed as asked."""
    home = Path(spec.recipe.training.output_dir)
    backend = "gloo" if spec.device_type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    settings = TrainingArguments(
        output_dir=str(home / rundir.CHECKPOINTS),
        log_level="error",
        **{"ddp_backend": backend, **spec.training_arguments, **changes},
    )
    # With several GPUs and one process Hugging Face would split each batch over all of them (DataParallel).
    settings._n_gpu = min(settings.n_gpu, 1)
    return settings
