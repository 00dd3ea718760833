"""From `data` in a recipe to what a trainer iterates over: the whole story of the data, top to bottom."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow.compute

from ftune.data import cache as store
from ftune.data.detect import choose_format
from ftune.data.faults import Faults
from ftune.data.pack import best_fit_decreasing
from ftune.data.parts import Encoding, Part, Tally, encoded_rows
from ftune.data.template import use_template_file
from ftune.data.tokenize import Encoded, require_fast
from ftune.errors import DataError, Place, Problem
from ftune.plugin import PlainText, Turn
from ftune.recipe.schema import Data

Prompt = tuple[Turn, ...] | PlainText

_PROMPTS = 3
_OPENING_WORDS = 8
"""Plain text asks nothing; its first words are what a sample goes on from."""
_PACKED_BATCH = 64
"""Sequences written at once: an Arrow file of many tiny batches is slow to read."""
_STREAMED_PACK = 1024
"""Rows gathered for packing while streaming: the more, the fuller the sequences and the longer the wait."""


@dataclass(frozen=True)
class Prepared:
    """Tokenised data and what is to be said about them."""

    train: datasets.Dataset | datasets.IterableDataset
    eval: datasets.Dataset | None
    format: str
    statistics: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per part; none for streamed training rows, which nobody has seen yet."""
    prompts: tuple[Prompt, ...] = ()
    """What comes before the first learned answer, of the first evaluation rows or else training rows."""
    warnings: tuple[str, ...] = ()


def prepare(
    data: Data, *, tokenizer: Any, seed: int, cache: Path | None, trains_whole_text_only: bool = False
) -> Prepared:
    """Return the data as tokens; DataError for what cannot be read or learned from.

    With `data.chat_template` the tokenizer is given that template. `trains_whole_text_only` refuses formats that
    distinguish questions from answers.
    """
    require_fast(tokenizer)
    if data.chat_template:
        use_template_file(tokenizer, data.chat_template)
    cache = store.writable(cache)
    train, evaluation = _parts(data, seed)
    chosen = choose_format(data.format, train, whole_text_only=trains_whole_text_only)
    answers_only = bool(getattr(data, chosen.loss_setting))
    encoding = Encoding(chosen, tokenizer, answers_only, data.max_length)
    statistics: dict[str, dict[str, int]] = {}
    if data.streaming:
        rows: Any = _streamed(train, encoding, data, seed)
    else:
        rows, statistics[train.name] = _tokenised(train, encoding, cache, packing=data.packing)
    eval_rows = None
    if evaluation:
        eval_rows, statistics[evaluation.name] = _tokenised(evaluation, encoding, cache, packing=data.packing)
    warnings = [text for name, counts in statistics.items() for text in _warnings(name, counts, data.max_length)]
    if evaluation and evaluation.picked is None and (shared := set(train.sources) & set(evaluation.sources)):
        warnings.append(f"data.train and data.eval both read {', '.join(sorted(shared))}: eval_loss will flatter")
    prompts = _prompts(evaluation or train, encoding)
    return Prepared(rows, eval_rows, chosen.name, statistics, prompts, tuple(warnings))


def _parts(data: Data, seed: int) -> tuple[Part, Part | None]:
    """Return the training part and the evaluation part; a fraction is drawn by rows, with the seed."""
    train = Part("train", _listed(data.train), data.train_split)
    if not data.eval:
        return replace(train, most=data.max_train_samples), None
    if not isinstance(data.eval, float):
        evaluation = Part("eval", _listed(data.eval), data.eval_split, most=data.max_eval_samples)
        return replace(train, most=data.max_train_samples), evaluation
    faults = Faults()
    count = sum(1 for _ in train.rows(faults))
    faults.stop()
    if count < 2:
        what = f"data.eval = {data.eval} holds out training rows, but there is only {count}"
        raise DataError(Problem("too-few-rows", what, Place(train.sources[0]), fix="add rows, or leave out data.eval"))
    held_out = min(count - 1, max(1, round(count * data.eval)))
    picked = frozenset(random.Random(seed).sample(range(count), held_out))
    evaluation = replace(train, name="eval", picked=picked, held_out=True, most=data.max_eval_samples)
    return replace(train, picked=picked, most=data.max_train_samples), evaluation


def _listed(sources: str | list[str]) -> tuple[str, ...]:
    return (sources,) if isinstance(sources, str) else tuple(sources)


def _tokenised(
    part: Part, encoding: Encoding, cache: Path | None, *, packing: bool
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Return a part's rows, packed or not, from the cache where they are."""
    key, known = _key(part, encoding) if cache else ("", False)
    found = store.find(cache, key) if cache and known else None
    if found is None:
        tally = Tally()
        batches = (store.as_columns(rows) for rows in encoded_rows(part, encoding, tally))
        rows = store.write(cache, key, store.COLUMNS, batches)
        found = rows, tally.as_dict()
        store.write_notes(cache, key, tally.as_dict())
    if not packing:
        return found
    rows, counts = found
    packed_key = f"{key}-packed"
    packed = store.find(cache, packed_key) if cache and known else None
    if packed is None:
        sequences = store.write(cache, packed_key, store.PACKED_COLUMNS, _packed_batches(rows, encoding.max_length))
        packed = sequences, {**counts, "sequences": len(sequences)}
        store.write_notes(cache, packed_key, packed[1])
    return packed


def _key(part: Part, encoding: Encoding) -> tuple[str, bool]:
    """Return the name of the part's stored rows, and whether it tells their contents."""
    contents = [store.source_fingerprint(source, part.split) for source in part.sources]
    picked = sorted(part.picked) if part.picked is not None else None
    key = store.key_of(
        store.tokenizer_fingerprint(encoding.tokenizer),
        contents if None not in contents else part.sources,
        [part.split, picked, part.held_out, part.most],
        [encoding.format.name, encoding.answers_only, encoding.max_length],
    )
    return key, None not in contents


def _packed_batches(rows: datasets.Dataset, capacity: int) -> Iterator[dict[str, list[Any]]]:
    lengths = pyarrow.compute.list_value_length(rows.data.column("input_ids")).to_pylist()
    arrays = rows.with_format("numpy")
    groups = iter(best_fit_decreasing(lengths, capacity))
    while taken := list(itertools.islice(groups, _PACKED_BATCH)):
        rows_of = [arrays[group] for group in taken]
        joined = [_joined(list(found["input_ids"]), list(found["labels"])) for found in rows_of]
        yield {column: [sequence[column] for sequence in joined] for column in store.PACKED_COLUMNS}


def _joined(ids: list[Any], labels: list[Any]) -> dict[str, Any]:
    """Return rows as one sequence; restarting positions tell the model where each begins."""
    positions = [numpy.arange(len(row), dtype=numpy.int32) for row in ids]
    columns = zip(store.PACKED_COLUMNS, (ids, labels, positions), strict=True)
    return {column: numpy.concatenate(values) for column, values in columns}


def _streamed(part: Part, encoding: Encoding, data: Data, seed: int) -> datasets.IterableDataset:
    # What is wrong with the first rows or the template is found now, not after the model is loaded.
    next(encoded_rows(part, encoding, Tally()), None)
    columns = store.PACKED_COLUMNS if data.packing else store.COLUMNS
    settings = {"part": part, "encoding": encoding, "packing": data.packing}
    rows = datasets.IterableDataset.from_generator(_stream, features=store.features(columns), gen_kwargs=settings)
    return rows.shuffle(seed=seed, buffer_size=data.shuffle_buffer_size)


def _stream(part: Part, encoding: Encoding, packing: bool) -> Iterator[dict[str, Any]]:
    # Pass after pass in one stream: a resumed run then skips what was seen, whichever pass it was in.
    passes = (encoded_rows(part, encoding, Tally()) for _ in itertools.repeat(None))
    rows = itertools.chain.from_iterable(itertools.chain.from_iterable(passes))
    if not packing:
        yield from ({"input_ids": row.input_ids, "labels": row.labels} for row in rows)
        return
    while taken := list(itertools.islice(rows, _STREAMED_PACK)):
        yield from _packed_stretch(taken, encoding.max_length)


def _packed_stretch(rows: list[Encoded], capacity: int) -> Iterator[dict[str, Any]]:
    for group in best_fit_decreasing([len(row.input_ids) for row in rows], capacity):
        yield _joined([rows[at].input_ids for at in group], [rows[at].labels for at in group])


def _prompts(part: Part, encoding: Encoding) -> tuple[Prompt, ...]:
    faults = Faults()
    prompts: list[Prompt] = []
    for row in part.rows(faults):
        conversation = encoding.conversation(row, faults)
        if conversation is None:
            continue
        answers = [at for at, turn in enumerate(conversation.turns) if turn.role == "assistant" and turn.trained]
        text = conversation.prompt or " ".join(conversation.completion.split()[:_OPENING_WORDS])
        if answers and answers[0]:
            prompts.append(conversation.turns[: answers[0]])
        elif text:
            prompts.append(PlainText(text))
        if len(prompts) == _PROMPTS:
            break
    return tuple(prompts)


def _warnings(name: str, counts: dict[str, int], max_length: int) -> Iterator[str]:
    """Yield what is not wrong but will surprise."""
    rows = counts["rows"]
    if counts["cut_rows"]:
        share = counts["cut_tokens"] / (counts["tokens"] + counts["cut_tokens"])
        yield (
            f"{name}: {counts['cut_rows']} of {rows} rows are longer than data.max_length {max_length} and were cut: "
            f"{counts['cut_tokens']} tokens ({share:.1%}) are lost; the longest row has {counts['longest']}"
        )
    if counts["dropped_rows"]:
        yield (
            f"{name}: {counts['dropped_rows']} rows were left out, since no token of them counts in the loss: "
            f"{counts['unanswered_rows']} without a learned answer, "
            f"{counts['dropped_rows'] - counts['unanswered_rows']} whose answer was cut off"
        )
    if counts["endless_rows"] == rows:
        yield f"{name}: no row teaches an end mark such as <|im_end|>, so the model may not learn when to stop"
    if counts["joined_rows"]:
        yield (
            f"{name}: in {counts['joined_rows']} rows a token spans the end of the prompt and the start of the answer; "
            "let no prompt end with a blank and no answer begin with a line break"
        )
