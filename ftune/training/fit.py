"""Whether a run can be held: rows by the model's context, checkpoints by the disk."""

from __future__ import annotations

import math

from ftune.data.prepare import Prepared
from ftune.errors import Problem, RecipeError
from ftune.models.load import max_positions
from ftune.recipe.schema import Recipe
from ftune.training import checkpoint
from ftune.training.trainer import FtuneTrainer


def check_lengths(recipe: Recipe, data: Prepared, model: object) -> None:
    """Raise RecipeError where rows are longer than the positions the model knows."""
    most = max_positions(model)
    longest = max([counts["longest"] for counts in data.statistics.values()], default=0)
    longest = recipe.data.max_length if recipe.data.streaming else min(longest, recipe.data.max_length)
    if most is None or longest <= most:
        return
    why = f"the longest row has {longest} tokens"
    fix = f"set data.max_length: {most}"
    raise RecipeError(Problem("max-length", f"this model knows {most} positions", why=why, fix=fix))


def check_room(trainer: FtuneTrainer) -> None:
    """Raise MachineError where the disk cannot hold the checkpoints and the result."""
    training = trainer.recipe.training
    checkpoint_bytes, model_bytes = trainer.saved_bytes()
    saves = 0
    if training.save_strategy != "no":
        steps = trainer.planned_steps()
        every = training.save_steps if training.save_steps >= 1 else max(1, steps * training.save_steps)
        saves = math.ceil(training.num_train_epochs) if training.save_strategy == "epoch" else math.ceil(steps / every)
    checkpoint.check_room(
        trainer.directory,
        checkpoint_bytes=checkpoint_bytes,
        model_bytes=model_bytes,
        keep=training.save_total_limit,
        saves=saves,
    )
