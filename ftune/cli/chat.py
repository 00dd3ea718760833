"""`ftune chat`: talk to a run or a model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def chat(
    target: Annotated[
        str, typer.Argument(metavar="RUN_DIR|MODEL", help="A run directory, a model folder or name, package:NAME.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer alone, and leave.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 takes the likeliest token; default 0 with --prompt, else 0.7.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file inside the model's folder.")] = None,
) -> None:
    """Talk to a run or a model, with the template it was trained with.

    Without --prompt a conversation begins: Ctrl-D or /exit leaves, /reset forgets.

    Example: ftune chat runs/my-run --prompt "What is the capital of France?"
    """
    from ftune import chat as talk
    from ftune.errors import Problem, RecipeError

    if prompt is None and sys.stdin is None:
        raise RecipeError(Problem("no-input", "there is no input to read questions from", fix="ask one with --prompt"))
    model, tokenizer = talk.open_target(target, gguf_file, say=lambda line: typer.echo(line, err=True))
    if prompt is not None:
        reply = talk.ask(
            model,
            tokenizer,
            prompt,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=0.0 if temperature is None else temperature,
        )
        typer.echo(reply)
        return
    if sys.stdin.isatty():
        kind = "" if tokenizer.chat_template else " It was not trained on turns, so it continues your text."
        typer.echo(talk.HELP + kind, err=True)
    talk.converse(
        model,
        tokenizer,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=0.7 if temperature is None else temperature,
    )
