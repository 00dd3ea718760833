"""Talk to a model in the template it was trained with: one question, or a conversation that streams."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import torch
from pydantic import ValidationError

from ftune.data.detect import reads_plain_text
from ftune.errors import Problem, RecipeError
from ftune.models import generate, golden
from ftune.models.finished import ADAPTER, finished_tokenizer, is_run, load_finished, of_folder, of_run, recipe_of
from ftune.models.load import load_model, load_tokenizer, max_positions
from ftune.models.source import Say, silent
from ftune.places import expanded
from ftune.plugin import Conversation, Turn
from ftune.recipe.schema import Model

HELP = "Ctrl-D or /exit leaves, /reset forgets the conversation."


def open_target(target: str, gguf_file: str | None = None, say: Say = silent) -> tuple[Any, Any]:
    """Return model and tokenizer of a run directory, a model folder, a hub name or `package:NAME`."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    model = _named(target, gguf_file)
    path = expanded(target)
    if gguf_file is None and path.is_dir() and (is_run(path) or (path / ADAPTER).is_file()):
        found = of_run(path) if is_run(path) else of_folder(path)
        tokenizer = finished_tokenizer(found, say)
        recipe = recipe_of(path)
        if golden.reads_plain_text(found.folder) or (recipe is not None and reads_plain_text(recipe.data)):
            tokenizer.chat_template = None  # it learned to go on from plain text, not to take turns
        return load_finished(found, device_type=device_type, say=say, as_trained=True), tokenizer
    tokenizer = load_tokenizer(model, say)
    if gguf_file is None and path.is_dir():
        golden.check(path, tokenizer)
        if golden.reads_plain_text(path):
            tokenizer.chat_template = None
    return load_model(model, device_type=device_type, say=say), tokenizer


def _named(target: str, gguf_file: str | None) -> Model:
    try:
        return Model(model_name_or_path=target, gguf_file=gguf_file)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--gguf-file" if first["loc"][:1] == ("gguf_file",) else "RUN_DIR|MODEL"
        said = first["msg"].removeprefix("Value error, ")
        fix = "name a run directory, a model folder or a hub name; --gguf-file is a file inside the model's folder"
        raise RecipeError(Problem("bad-value", f"{name} cannot be {first['input']!r}", why=said, fix=fix)) from None


def answer(
    model: Any,
    tokenizer: Any,
    turns: tuple[Turn, ...],
    *,
    max_new_tokens: int,
    temperature: float,
    streamer: Any = None,
) -> str:
    """Return the next turn; a streamer gets its words as they come."""
    ids, most = generate.fitted(model, generate.encode(tokenizer, Conversation(turns)), max_new_tokens)
    with generate.answering(model):
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            streamer=streamer,
            **generate.settings(model, tokenizer, temperature),
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def ask(model: Any, tokenizer: Any, prompt: str, *, system: str | None, max_new_tokens: int, temperature: float) -> str:
    """Return the answer to one prompt."""
    turns = (*_opening(system), Turn("user", _clean(prompt)))
    turns = _that_fit(model, tokenizer, turns, max_new_tokens)
    return answer(model, tokenizer, turns, max_new_tokens=max_new_tokens, temperature=temperature)


def converse(
    model: Any,
    tokenizer: Any,
    *,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    read: Callable[[], str] | None = None,
) -> None:
    """Read, answer aloud, remember; ends with the input."""
    from transformers import TextStreamer

    listen = read or _read_line
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    opening = _opening(system)
    turns = opening
    while True:
        try:
            said = _clean(listen()).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if said in ("/exit", "/quit"):
            return
        if said == "/reset" or not said:
            turns = opening if said else turns
            continue
        if not tokenizer.chat_template:
            turns = opening  # plain text goes on from the last line alone
        turns = _that_fit(model, tokenizer, (*turns, Turn("user", said)), max_new_tokens)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            reply = answer(
                model, tokenizer, turns, max_new_tokens=max_new_tokens, temperature=temperature, streamer=streamer
            )
        except KeyboardInterrupt:  # stop this answer, not the conversation
            streamer.end()
            turns = turns[:-1]
            continue
        turns = (*turns, Turn("assistant", reply))


def _opening(system: str | None) -> tuple[Turn, ...]:
    return (Turn("system", _clean(system)),) if system else ()


def _clean(text: str) -> str:
    """Replace what is no letter: Python reads bytes that are not UTF-8 as half surrogate pairs."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _that_fit(model: Any, tokenizer: Any, turns: tuple[Turn, ...], max_new_tokens: int) -> tuple[Turn, ...]:
    """Forget the oldest exchange, keeping the system turn, until the answer has room within the model's positions."""
    room = (max_positions(model) or sys.maxsize) - max_new_tokens
    first = 1 if turns[0].role == "system" else 0
    while len(turns) - first > 2 and generate.encode(tokenizer, Conversation(turns)).shape[1] > room:
        turns = (*turns[:first], *turns[first + 2 :])
    return turns


def _read_line() -> str:
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())

        return input("> ")
    return input()
