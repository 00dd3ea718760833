"""Let a model answer: greedily, one prompt at a time, leaving the model as it was and drawing no random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ftune.data.template import render
from ftune.errors import Problem, RecipeError
from ftune.models.load import max_positions
from ftune.plugin import Conversation, PlainText, RowError, Turn

Prompt = str | Conversation | PlainText
"""A bare text is a user's turn where the tokenizer has a template."""


LOWEST_TEMPERATURE = 1e-4
"""Below it the likeliest token is taken: it always wins, and dividing by less would overflow."""


def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int = 64, *, together: bool = False
) -> list[str]:
    """Return what the model says to each prompt; autocast, if any, is the caller's.

    `together`: ranks that share the weights all ask, and none ends before the others.
    """
    answers = []
    with answering(model):
        for prompt in prompts:
            ids, most = fitted(model, encode(tokenizer, prompt), max_new_tokens)
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                synced_gpus=together,
                **settings(model, tokenizer),
            )
            answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def encode(tokenizer: Any, prompt: Prompt) -> torch.Tensor:
    """Return token ids (1, n): a conversation through the chat template, plain text as it was trained."""
    if isinstance(prompt, PlainText) or not tokenizer.chat_template:
        text = prompt.text if isinstance(prompt, PlainText) else prompt
        text = text if isinstance(text, str) else "\n".join(turn.content for turn in text.turns)
        ids = tokenizer(text, add_special_tokens=True)["input_ids"]
        ids = _without_end(ids, tokenizer)
    else:
        asked = Conversation((Turn("user", prompt),)) if isinstance(prompt, str) else prompt
        # The template writes the beginning-of-text token itself: a second one would be unlike training.
        ids = tokenizer(_templated(tokenizer, asked), add_special_tokens=False)["input_ids"]
    if not ids:
        ids = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id or 0]
    return torch.tensor([ids], dtype=torch.long)


def _templated(tokenizer: Any, asked: Conversation) -> str:
    try:
        return render(tokenizer, asked.turns, asked.tools, add_generation_prompt=True)
    except RowError as error:
        fix = (
            error.fix
            or f"the roles are: {', '.join(turn.role for turn in asked.turns)}; ask with those the model knows"
        )
        raise RecipeError(Problem("template-refuses", error.what, fix=fix)) from error


def fitted(model: Any, ids: torch.Tensor, max_new_tokens: int) -> tuple[torch.Tensor, int]:
    """Return the ids on the model's device and how many may follow: beyond its positions a model fails or rambles.

    What is too long loses its beginning, and the answer keeps a quarter of the positions.
    """
    ids = ids.to(next(model.parameters()).device)
    most = max_positions(model)
    if most is None or ids.shape[1] + max_new_tokens <= most:
        return ids, max_new_tokens
    new = max(most - ids.shape[1], min(max_new_tokens, max(1, most // 4)))
    return ids[:, -max(1, most - new) :], new


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Some tokenizers close every text with the end token, after which nothing is left to say."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def settings(model: Any, tokenizer: Any, temperature: float = 0.0) -> dict[str, Any]:
    """Return what `generate` needs: it ends at the tokenizer's end token and at any the model names."""
    own = model.generation_config.eos_token_id
    ends = {own} if isinstance(own, int) else set(own or ())
    ends |= {tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id
    chosen: dict[str, Any] = {"use_cache": True, "eos_token_id": sorted(ends) or None}
    chosen["pad_token_id"] = pad if pad is not None else (min(ends) if ends else 0)
    if temperature >= LOWEST_TEMPERATURE:
        return {**chosen, "do_sample": True, "temperature": temperature}
    # None also undoes what a model's generation_config says: greedy with a temperature would warn.
    return {**chosen, "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@contextlib.contextmanager
def answering(model: Any) -> Iterator[None]:
    """Hold the model in evaluation mode, with its cache on and no gradient checkpointing, then put all of it back."""
    from ftune.models.quiet import quiet

    training = {module: module.training for module in model.modules()}
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    config = model.config
    had_cache, use_cache = hasattr(config, "use_cache"), getattr(config, "use_cache", None)
    try:
        model.eval()
        for module in checkpointing:
            module.gradient_checkpointing = False
        config.use_cache = True
        with torch.no_grad(), quiet():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for module in checkpointing:
            module.gradient_checkpointing = True
        if had_cache:
            config.use_cache = use_cache
        else:
            del config.use_cache
