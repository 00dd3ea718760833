"""Whether a run can be held: rows by the model's context, checkpoints by the disk."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ftune import plugin
from ftune.data.prepare import Prepared
from ftune.data.sequences import Sequences
from ftune.errors import Problem, RecipeError
from ftune.models.load import max_positions
from ftune.recipe.schema import Recipe
from ftune.training import checkpoint
from ftune.training.trainer import FtuneTrainer


def check_lengths(recipe: Recipe, data: Prepared, model: object) -> None:
    """Raise RecipeError where rows are longer than the positions the model knows."""
    most = max_positions(model)
    longest = recipe.data.max_length if recipe.data.streaming else min(data.longest, recipe.data.max_length)
    if most is None or longest <= most:
        return
    why = f"the longest row has {longest} tokens"
    fix = f"set data.max_length: {most}"
    raise RecipeError(Problem("max-length", f"this model knows {most} positions", why=why, fix=fix))


def check_packing(recipe: Recipe, model: Any) -> None:
    """Raise RecipeError where packed rows would see each other: some architectures ignore where a document begins."""
    if not recipe.data.packing:
        return
    training = model.training
    model.eval()
    try:
        moved = _leak(recipe, model)
    except (TypeError, ValueError) as error:
        raise _mixes_rows(f"it does not take the positions that say where a row begins: {error}") from error
    finally:
        model.train(training)
    if moved:
        raise _mixes_rows("other words in one row changed what it says in the next row of the sequence")


def _leak(recipe: Recipe, model: Any) -> bool:
    """Return whether the second of two packed documents comes out otherwise when the first one is changed."""
    length, rows = 8, model.get_input_embeddings().num_embeddings
    weight = next(model.parameters())
    ids = torch.arange(2 * length, device=weight.device)[None] % rows
    changed = ids.clone()
    changed[:, :length] = (ids[:, :length] + max(1, rows // 2)) % rows
    positions = torch.arange(length, device=weight.device).repeat(2)[None]
    settings = recipe.training
    mixed = torch.bfloat16 if settings.bf16 is True else torch.float16 if settings.fp16 is True else None
    # FlashAttention knows 16 bits only, which a float32 model has under autocast alone.
    narrow = torch.autocast(weight.device.type, dtype=mixed) if mixed else contextlib.nullcontext()
    with torch.no_grad(), narrow:
        first, second = (
            model(input_ids=each, position_ids=positions, use_cache=False).logits[:, length:].float()
            for each in (ids, changed)
        )
    rounding = 1e-4 if mixed is None and weight.dtype == torch.float32 else 2e-2
    return bool((first - second).abs().max() > rounding * first.abs().max())


def _mixes_rows(why: str) -> RecipeError:
    what = "this model lets packed rows see each other"
    return RecipeError(Problem("packing-mixes-rows", what, why=why, fix="set data.packing: false"))


def check_vocabulary(tokenizer: Any, model: Any, data: Prepared | None = None) -> None:
    """Raise RecipeError where the tokenizer writes ids for which the model has no embedding.

    Where the rows have all been tokenised, only ids that are in them count: some models ship names for tokens they do
    not have. Padding is replaced by the collator.
    """
    rows = model.get_input_embeddings().num_embeddings
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    largest = _largest_id(data)
    if largest is not None:
        wrong = [token for number, token in sorted(beyond.items()) if number <= largest] if largest >= rows else []
    else:
        wrong = [token for number, token in sorted(beyond.items()) if _may_occur(tokenizer, number, token)]
    if wrong:
        named = ", ".join(f"`{token}`" for token in wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else "")
        why = f"the model has embeddings for {rows} tokens, the tokenizer's ids go up to {max(beyond)}"
        fix = "save the model with resize_token_embeddings(len(tokenizer)), or use the tokenizer that belongs to it"
        raise RecipeError(Problem("vocabulary", f"the model does not know the tokens {named}", why=why, fix=fix))


def _largest_id(data: Prepared | None) -> int | None:
    """Return the largest id in the rows; None where not all of them have been seen."""
    if data is None or not isinstance(data.train, Sequences):
        return None
    return max(part.largest_id() for part in (data.train, data.eval) if part is not None)


def _may_occur(tokenizer: Any, number: int, token: str) -> bool:
    if number in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        return True
    added = tokenizer.added_tokens_decoder.get(number)
    return number != tokenizer.pad_token_id and (
        added is None or not added.special or token in str(tokenizer.chat_template or "")
    )


def unfinished_sweep(trainer: FtuneTrainer) -> Problem | None:
    """Return what to say where weights move in turn, and the run ends before all have had theirs."""
    tuning, steps = plugin.tuning(trainer.recipe.tuning.method), trainer.planned_steps()
    if not tuning.rotates:
        return None
    needed, setting = tuning.sweep(
        trainer.model,
        trainer.trained,
        trainer.recipe.tuning.options,
        steps=steps,
        steps_per_epoch=trainer.steps_per_epoch(),
    )
    if steps >= needed:
        return None
    fix = f"train for {needed} steps or more" + (f", or set {setting}" if setting else "")
    why = f"{tuning.name} takes {needed} steps or more to give every weight a turn, and the run has {steps}"
    return Problem("sweep-unfinished", "some weights will not have moved at the end", why=why, fix=fix)


def check_room(trainer: FtuneTrainer) -> None:
    """Raise MachineError where the disk cannot hold the checkpoints and the result."""
    training = trainer.recipe.training
    checkpoint_bytes, model_bytes = trainer.saved_bytes()
    checkpoint.check_room(
        trainer.directory,
        checkpoint_bytes=checkpoint_bytes,
        model_bytes=model_bytes,
        keep=training.save_total_limit,
        saves=checkpoint.planned_saves(training, trainer.planned_steps()),
    )
