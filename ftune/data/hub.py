"""Rows of a hub data set, streamed; what goes wrong there, in words that help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftune.data.faults import fault
from ftune.errors import DataError


def hub_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    """Yield a split's rows as they are downloaded."""
    import datasets

    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:
        # `datasets` raises anything from OSError to ValueError here, and the text is the user's clue.
        problem = fault(f"cannot read the hub data set {name}", name, why=_first_line(error), fix=_fix(name, error))
        raise DataError(problem) from error


def revision(name: str) -> str | None:
    """Return the commit of a hub data set, or None where it cannot be told: then nothing cached is reused."""
    import datasets

    try:
        return datasets.load_dataset_builder(name).hash  # type: ignore[no-any-return]
    except Exception:
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _fix(name: str, error: Exception) -> str:
    import datasets

    text = str(error)
    if "Bad split" in text or "Unknown split" in text:
        return "set data.train_split or data.eval_split to one that is there: " + _splits(name)
    if "Config name is missing" in text:
        return "it has several configurations: save the one you want to a file and name that file"
    if "gated" in text or "401" in text or "403" in text:
        return "log in with `hf auth login` and accept the data set's terms on its page"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return "check the spelling; a file or directory of that name is not there either"
    if isinstance(error, OSError):
        return "is this machine offline, or HF_HUB_OFFLINE set? download it elsewhere and name the files"
    return "look at the data set's page, or download it and name the files"


def _splits(name: str) -> str:
    import datasets

    try:
        return ", ".join(datasets.get_dataset_split_names(name))
    except Exception:
        return "its page lists them"
