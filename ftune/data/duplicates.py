"""Rows that are there more than once, exactly or nearly, and rows of evaluation that are also learned.

Rows are compared as sets of five tokens in a row (shingles), without the beginning that many share: a system prompt
or an instruction would make any two short rows alike. MinHash (Broder, 1997) finds pairs worth comparing; only those
whose shingles are really the same for the most part count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy

from ftune.data.tokens import TokenFile

LAYOUT = 1
"""Raised whenever the same rows would give another answer."""
NEARLY = 0.8
"""Share of shingles in both rows of all in either, from which on they are nearly the same."""
MOST_SEARCHED = 200_000
"""So many rows are searched for near copies; of more, so many by chance."""
MOST_PAIRS = 100
"""Copies that are kept by place, of each kind."""

_WIDTH = 5
_PERMUTATIONS, _BANDS = 120, 24
"""Five values a band: of two rows just alike enough, 99.99 % are compared, of half alike ones half."""
_DOUBTED = 0.6
"""Below this estimate two rows are not compared: it is 5 standard deviations from NEARLY."""
_NEIGHBOURS = 4
"""In a crowd of like rows each is compared with so many of the first and of those before it."""
_TRIES = 12
_CHUNK = 4096
_FEW = 64
"""In fewer rows than this a beginning is shared only where all share it."""
_SHARED = 10
"""Elsewhere where a tenth of the rows does."""
_ODD = numpy.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F])
_ODD = _ODD.astype(numpy.uint64)


@dataclass
class Copies:
    """How many rows of a part are copies, and of which rows."""

    rows: int = 0
    searched: int = 0
    """Rows that were searched for near copies."""
    counts: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By kind, the first copies: a row and the one that it is a copy of, both counted through all files searched."""

    def note(self, kind: str, row: int, like: int) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.pairs.setdefault(kind, [])
        if len(shown) < MOST_PAIRS:
            shown.append((row, like))


def find_copies(train: Sequence[TokenFile], evaluation: Sequence[TokenFile] = ()) -> dict[str, Copies]:
    """Return which rows of training and of evaluation are copies; the same rows give the same answer."""
    rows = _Rows([*train, *evaluation])
    border = sum(len(file) for file in train)
    found = {"train": Copies(rows=border), "eval": Copies(rows=len(rows) - border)}
    first, same = _exact(rows)
    single = numpy.flatnonzero(first)
    # A row of evaluation that is one of training is told as that, however often it is there.
    copied = {name: {} for name in found}  # type: dict[str, dict[int, tuple[str, int]]]
    for row in numpy.flatnonzero(~first).tolist():
        name = "train" if row < border else "eval"
        copied[name][row] = ("train-in-eval" if same[row] < border <= row else "duplicate", int(same[row]))
    searched = _sampled(single)
    for row, like in _near(rows, searched, border):
        name = "train" if row < border else "eval"
        copied[name][row] = ("train-in-eval" if like < border <= row else "near-duplicate", like)
    for name, copies in found.items():
        inside = (searched < border) == (name == "train")
        # Exact copies need no search.
        copies.searched = copies.rows - int(((single < border) == (name == "train")).sum()) + int(inside.sum())
        for row, (kind, like) in sorted(copied[name].items()):
            copies.note(kind, row, like)
    return {name: copies for name, copies in found.items() if copies.rows}


class _Rows:
    """The rows of several files under one number each."""

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self.files = files
        self.starts = numpy.cumsum([0, *(len(file) for file in files)])
        self.skip = numpy.zeros(len(self), dtype=numpy.int64)
        """How many tokens at the beginning of a row are shared."""
        self.branch = numpy.zeros(len(self), dtype=numpy.uint64)
        """Which beginning that is: rows are only alike where they begin alike."""
        self.shingles = lru_cache(maxsize=_CHUNK)(self._set)
        """The hashes of a row's shingles, sorted, each once."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def texts(self, row: int) -> list[numpy.ndarray]:
        """Return the tokens of each text of a row."""
        number = int(numpy.searchsorted(self.starts, row, side="right")) - 1
        file = self.files[number]
        return [file.row(row - int(self.starts[number]), view).input_ids for view in file.views]

    def tokens_at(self, rows: numpy.ndarray, place: int) -> numpy.ndarray:
        """Return the token at one place of each row, -1 behind its end; the rows are sorted."""
        borders = numpy.searchsorted(rows, self.starts)
        parts = [
            file.tokens_at(rows[borders[at] : borders[at + 1]] - self.starts[at], place)
            for at, file in enumerate(self.files)
        ]
        return numpy.concatenate(parts)

    def hashes(self, chosen: Sequence[int]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return the hashes of the rows' shingles, one row's after the other's, and where each row's begin."""
        parts = [self._compared(row) for row in chosen]
        hashes, counts = _hashed([text for part in parts for text in part])
        ends = numpy.cumsum([0, *(len(part) for part in parts)])
        starts = numpy.concatenate([[0], numpy.cumsum(counts)])[ends]
        return hashes ^ numpy.repeat(self.branch[list(chosen)], numpy.diff(starts)), starts

    def _set(self, row: int) -> numpy.ndarray:
        return numpy.unique(self.hashes([row])[0])

    def _compared(self, row: int) -> list[numpy.ndarray]:
        """Return the texts of a row without the beginning that it shares with many."""
        first, *others = self.texts(row)
        skip = int(self.skip[row])
        same = [len(text) >= skip and bool((text[:skip] == first[:skip]).all()) for text in others]
        return [first[skip:], *(text[skip:] if alike else text for text, alike in zip(others, same, strict=True))]


def _hashed(texts: Sequence[numpy.ndarray]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return a hash of each five tokens in a row of a text, of all its tokens where there are fewer; and how many."""
    lengths = numpy.array([max(len(text), _WIDTH) for text in texts])
    ids = numpy.zeros(int(lengths.sum()), dtype=numpy.uint64)
    ends = numpy.cumsum(lengths)
    for text, start in zip(texts, ends - lengths, strict=True):
        ids[start : start + len(text)] = text
        ids[start : start + len(text)] += numpy.uint64(1)
    mixed = numpy.zeros(len(ids) - _WIDTH + 1, dtype=numpy.uint64)
    for at in range(_WIDTH):
        mixed += ids[at : at + len(mixed)] * _ODD[at]
        mixed ^= mixed >> numpy.uint64(29)
        mixed *= _ODD[_WIDTH - 1 - at]
    whole = numpy.ones(len(ids), dtype=bool)
    for back in range(1, _WIDTH):
        whole[ends - back] = False
    return (mixed ^ (mixed >> numpy.uint64(32)))[whole[: len(mixed)]], lengths - _WIDTH + 1


def _exact(rows: _Rows) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return whether each row is the first of its kind, and which row is."""
    seen: dict[bytes, int] = {}
    same = numpy.empty(len(rows), dtype=numpy.int64)
    for row in range(len(rows)):
        digest = hashlib.blake2b(digest_size=16)
        for text in rows.texts(row):
            digest.update(len(text).to_bytes(8, "little") + text.astype(numpy.int32).tobytes())
        same[row] = seen.setdefault(digest.digest(), row)
    return same == numpy.arange(len(rows)), same


def _sampled(rows: numpy.ndarray) -> numpy.ndarray:
    if len(rows) <= MOST_SEARCHED:
        return rows
    return numpy.sort(numpy.random.default_rng(0).choice(rows, MOST_SEARCHED, replace=False))


def _near(rows: _Rows, searched: numpy.ndarray, border: int) -> Iterator[tuple[int, int]]:
    """Yield each row that is nearly an earlier one, with that one; of an evaluation row rather one of training."""
    if len(searched) < 2:
        return
    _leave_out_beginnings(rows, searched)
    digests = _digests(rows, searched)
    pairs = _candidates(digests)
    alike = _estimates(digests, pairs)
    pairs, alike = pairs[alike >= _DOUBTED], alike[alike >= _DOUBTED]
    places = searched[pairs]
    within = (places[:, 0] >= border) & (places[:, 1] >= border)
    order = numpy.lexsort((places[:, 1], -alike, within, places[:, 0]))
    last, tries, done = -1, 0, False
    for row, like in places[order].tolist():
        if row != last:
            last, tries, done = row, 0, False
        if done or tries == _TRIES:
            continue
        tries += 1
        if jaccard(rows.shingles(row), rows.shingles(like)) >= NEARLY:
            done = True
            yield row, like


def jaccard(one: numpy.ndarray, other: numpy.ndarray) -> float:
    """Return how many of the values in either of two sorted sets are in both."""
    both = len(numpy.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def _leave_out_beginnings(rows: _Rows, searched: numpy.ndarray) -> None:
    """Find which beginnings many rows share, each row's longest, by going down the tree of their tokens."""
    enough = len(searched) if len(searched) < _FEW else max(_FEW // 2, len(searched) // _SHARED)
    waiting = [(searched, 0)]
    while waiting:
        together, depth = waiting.pop()
        tokens = rows.tokens_at(together, depth)
        values, counts = numpy.unique(tokens, return_counts=True)
        for value in values[(counts >= enough) & (values >= 0)]:
            members = together[tokens == value]
            before = rows.branch[members[0]] % numpy.uint64(2**31)
            rows.skip[members] = depth + 1
            rows.branch[members] = _hashed([numpy.array([before, depth, value], dtype=numpy.int64)])[0][0]
            waiting.append((members, depth + 1))


def _digests(rows: _Rows, searched: numpy.ndarray) -> numpy.ndarray:
    """Return the MinHash of each row, (n, permutations); in chunks, so that the shingles of all are never there."""
    from rensa import RMinHash

    digests = numpy.empty((len(searched), _PERMUTATIONS), dtype=numpy.uint32)
    for start in range(0, len(searched), _CHUNK):
        chunk = searched[start : start + _CHUNK].tolist()
        hashes, starts = rows.hashes(chunk)
        made: Any = RMinHash.digest_matrix_from_flat_token_hashes(hashes, starts.astype(numpy.uint64), _PERMUTATIONS, 0)
        digests[start : start + len(chunk)] = made.to_rows()
    return digests


def _candidates(digests: numpy.ndarray) -> numpy.ndarray:
    """Return pairs of rows that agree in a whole band, (n, 2), the later row first.

    Where many agree, each is paired with the first of them and with those just before it: the pairs grow with the rows
    and not with their square.
    """
    pairs = []
    for band in numpy.split(digests, _BANDS, axis=1):
        key = numpy.zeros(len(band), dtype=numpy.uint64)
        for column in band.T:
            key = (key ^ column.astype(numpy.uint64)) * _ODD[0]
            key ^= key >> numpy.uint64(31)
        order = numpy.argsort(key, kind="stable")
        ranked = key[order]
        begins = numpy.concatenate([[True], ranked[1:] != ranked[:-1]])
        first = numpy.maximum.accumulate(numpy.where(begins, numpy.arange(len(order)), 0))
        at = numpy.arange(len(order))
        for back in range(1, _NEIGHBOURS + 1):
            for other in (at - back, first + back - 1):
                fits = (other >= first) & (other < at)
                pairs.append(numpy.stack([order[fits], order[other[fits]]], axis=1))
        pairs = [numpy.unique(numpy.concatenate(pairs), axis=0)]
    return pairs[0]


def _estimates(digests: numpy.ndarray, pairs: numpy.ndarray) -> numpy.ndarray:
    """Return how alike the rows of each pair seem."""
    alike = numpy.zeros(len(pairs))
    for start in range(0, len(pairs), _CHUNK):
        one, other = digests[pairs[start : start + _CHUNK].T]
        alike[start : start + _CHUNK] = (one == other).mean(axis=1)
    return alike
