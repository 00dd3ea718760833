"""Rows that are easily told apart, prepared as for a run, and what a model would learn of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftune.data.prepare import Prepared, prepare
from ftune.recipe.schema import Data


def dialogue(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [dialogue(f"what is {number}?", f"it is {number}" + " the cat" * (number % 7)) for number in range(60)]


def prepared(tokenizer: Any, cache: Path | None = None, *, seed: int = 1, whole: bool = False, **data: Any) -> Prepared:
    learns = frozenset({"text"}) if whole else None
    return prepare(Data(**data), tokenizer=tokenizer, seed=seed, cache=cache, learns=learns)


def answers(tokenizer: Any, rows: Any) -> list[str]:
    return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in rows]


EXPECTED = [row["messages"][1]["content"] + "<|im_end|>" for row in ROWS]


def plain(made: Prepared) -> list[Any]:
    """Return all rows as lists, which can be compared."""
    rows = [*made.train, *(made.eval or ())]
    return [(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows]
