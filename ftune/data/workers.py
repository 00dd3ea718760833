"""Rows to tokens in several processes, in the order of the file."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from ftune.data.audit import Audit, RowChecks
from ftune.data.faults import Faults
from ftune.data.parts import Encoding
from ftune.data.rows import Row
from ftune.data.tokens import Kept, TokenRow, spans_of
from ftune.errors import DataError, Problem

BATCH = 512
"""Rows worked on at once: a tokenizer's fixed cost per call is that of a few rows."""
_ALONE = 8
"""Batches that one process does before others are started; starting them takes as long as a few."""

Outcome = tuple[list[Kept], Audit, list[Problem]]

_worker: _Worker


class _Worker:
    """What a process needs to work on rows."""

    def __init__(self, encoding: Encoding, files: tuple[str, ...]) -> None:
        self.encoding, self.checks = encoding, RowChecks(encoding)
        self.files = {name: number for number, name in enumerate(files)}

    def work(self, rows: list[Row]) -> Outcome:
        faults, audit = Faults(), Audit()
        kept: list[Kept] = []
        try:
            for worked in self.encoding.worked(rows, faults):
                if audit.take(worked, self.checks.kinds(worked)):
                    texts = tuple(TokenRow(each.input_ids, spans_of(each.labels)) for each in worked.encoded)
                    kept.append(Kept(self.files.get(worked.row.file, 0), worked.row.number, texts))
            faults.stop()
        except DataError as error:
            return [], audit, list(error.problems)
        return kept, audit, []


def _start(worker: _Worker) -> None:
    global _worker
    _worker = worker


def _work(rows: list[Row]) -> Outcome:
    return _worker.work(rows)


def outcomes(rows: Iterator[Row], encoding: Encoding, files: tuple[str, ...], processes: int) -> Iterator[Outcome]:
    """Yield what became of each batch of rows, in order; other processes help where there are many rows."""
    worker = _Worker(encoding, files)
    batches = iter(lambda: list(itertools.islice(rows, BATCH)), [])
    yield from (worker.work(batch) for batch in itertools.islice(batches, _ALONE if processes > 1 else None))
    if (taken := next(batches, None)) is not None:
        yield from _together(itertools.chain([taken], batches), worker, processes)


def _together(batches: Iterator[list[Row]], worker: _Worker, count: int) -> Iterator[Outcome]:
    # Forked, so that the tokenizer is there at once and on every platform that has it the same.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    with _one_thread_each(), ProcessPoolExecutor(count, context, _start, (worker,)) as pool:
        waiting: deque[Future[Outcome]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_work, batch))
                # No more ahead than keeps everyone busy: a million rows in the queue would be a million in memory.
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Turn the tokenizer's own threads off: beside a process per core they only get in each other's way."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
