"""From `data` in a recipe to what a trainer iterates over: the whole story of the data, top to bottom."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from ftune import rundir
from ftune.data import cache as store
from ftune.data import tokens
from ftune.data.audit import Audit, Found
from ftune.data.detect import choose_format
from ftune.data.duplicates import Copies
from ftune.data.faults import MOST_PROBLEMS, Faults
from ftune.data.mixing import mix, weights_of
from ftune.data.overview import copies_of, set_findings
from ftune.data.parts import Encoding, Part
from ftune.data.rows import files_of, is_local
from ftune.data.sequences import Sequences, sequences
from ftune.data.stream import stream
from ftune.data.template import use_template_file
from ftune.data.tokenize import require_fast
from ftune.data.workers import outcomes
from ftune.errors import DataError, Place, Problem
from ftune.findings import ROW_FINDINGS
from ftune.plugin import Conversation, PlainText
from ftune.recipe.schema import Data, Source, listed

Prompt = Conversation | PlainText

LOOKED_AT = 2000
"""So many rows of each streamed source are audited before the run."""
_PROMPTS = 3
_OPENING_WORDS = 8
"""Plain text asks nothing; its first words are what a sample goes on from."""


@dataclass(frozen=True)
class Reading:
    """One source's rows of one part, not yet read, and how they become tokens."""

    source: Source
    part: Part
    encoding: Encoding


@dataclass(frozen=True)
class Stored:
    """One source's rows of one part, as tokens on the disk, and what was found in them."""

    part: Part
    encoding: Encoding
    file: tokens.TokenFile
    audit: Audit
    key: str = ""
    """Tells the rows' contents; empty where nobody knows them."""

    def found(self, ignored: list[str]) -> list[Found]:
        return list(self.audit.found((*ROW_FINDINGS, *self.encoding.format.findings), ignored=ignored))

    def origin(self, row: int) -> tuple[str, int]:
        """Return the file that a stored row comes from, and its number there."""
        file, number = self.file.place(row)
        source, split = self.part.source, self.part.split
        return str(files_of(source)[file]) if is_local(source) else f"{source}/{split}", number


@dataclass(frozen=True)
class Prepared:
    """Tokenised data and what is to be said about them."""

    train: Any
    """Sequences, or an endless stream of rows."""
    eval: Sequences | None
    format: str
    """Of the first source."""
    stored: dict[str, tuple[Stored, ...]] = field(default_factory=dict)
    """Per part, its sources; none for streamed training rows, which nobody has seen yet."""
    prompts: tuple[Prompt, ...] = ()
    """What comes before the first learned answer, of the first evaluation rows or else training rows."""
    warnings: tuple[str, ...] = ()
    """What is odd, a line each, with its severity."""
    first_rows: tuple[Stored, ...] = ()
    """Of each source of streamed training rows the first ones, which were looked at."""
    copies: dict[str, Copies] = field(default_factory=dict)
    """Rows of each part that are there more than once."""
    fatal: tuple[Problem, ...] = ()
    """What would have stopped a run; only where somebody wanted to see it all the same."""
    names: tuple[str, ...] = ()
    """What the sources of training rows are called in the metrics."""

    @property
    def has_several_sources(self) -> bool:
        """Whether training or evaluation rows come from several: the loss of each is told then."""
        return max(len(self.names), len(self.eval.names) if self.eval else 0) > 1

    @property
    def seen(self) -> dict[str, tuple[Stored, ...]]:
        """Per part, what is known of its rows: of streamed training rows the first ones."""
        return {"train": self.first_rows, **self.stored} if self.first_rows else self.stored

    @property
    def longest(self) -> int:
        """Tokens of the longest row before it was cut; 0 where none was seen."""
        return max((each.audit.longest for every in self.stored.values() for each in every), default=0)


def readings_of(
    data: Data, *, tokenizer: Any, seed: int, cache: Path | None, learns: frozenset[str] | None = None
) -> dict[str, tuple[Reading, ...]]:
    """Return the sources of `train` and of `eval`; the tokenizer is given the recipe's chat template."""
    require_fast(tokenizer)
    if data.chat_template:
        use_template_file(tokenizer, data.chat_template)
    train_parts = _train_parts(data, seed, cache)
    parts = {"train": train_parts, "eval": _eval_parts(data, train_parts)}
    return {
        name: tuple(Reading(source, part, _encoding(data, source, part, tokenizer, learns)) for source, part in found)
        for name, found in parts.items()
    }


def prepare(
    data: Data,
    *,
    tokenizer: Any,
    seed: int,
    cache: Path | None,
    learns: frozenset[str] | None = None,
    strict: bool = True,
) -> Prepared:
    """Return the data as tokens; DataError for what cannot be read or learned from.

    With `data.chat_template` the tokenizer is given that template. `learns` names the formats that the objective learns
    from; without it, those of any objective. Not `strict`, it returns what would stop a run beside the data.
    """
    cache = store.writable(cache)
    readings = readings_of(data, tokenizer=tokenizer, seed=seed, cache=cache, learns=learns)
    kept: dict[str, tuple[Stored, ...]] = {}
    for name, found in readings.items():
        if found and not (data.streaming and name == "train"):
            kept[name] = tuple(_tokenised(found, cache, data))
    first_rows: tuple[Stored, ...] = ()
    train: Any
    if data.streaming:
        most = data.max_train_samples
        parts = [replace(each.part, most=most) for each in readings["train"]]
        # Not cached: its name would be a digest of files that are too large to be read before the run.
        first_rows = tuple(
            _stored(replace(part, most=min(most or LOOKED_AT, LOOKED_AT)), each.encoding, None, data)
            for part, each in zip(parts, readings["train"], strict=True)
        )
        streamed = zip(parts, readings["train"], strict=True)
        train = stream([(each.source.weight, part, each.encoding) for part, each in streamed], data, seed)
    else:
        train = _sequences(kept["train"], [each.source for each in readings["train"]], data, seed)
    seen = {"train": first_rows, **kept} if first_rows else kept
    copies = copies_of(seen, cache, data.audit_ignore)
    fatal = [problem for every in seen.values() for each in every for problem in _problems(each, data)]
    if fatal and strict:
        raise DataError(*fatal[:MOST_PROBLEMS])
    return Prepared(
        train,
        _sequences(kept["eval"], [], data, seed) if "eval" in kept else None,
        readings["train"][0].encoding.format.name,
        kept,
        _prompts((readings["eval"] or readings["train"])[0]),
        tuple(_told(seen, copies, data)),
        first_rows,
        copies,
        tuple(fatal),
        tuple(names_of([each.part for each in readings["train"]])),
    )


def _train_parts(data: Data, seed: int, cache: Path | None) -> list[tuple[Source, Part]]:
    """Return each source's training rows, without those that a fraction holds out, drawn by the seed."""
    found = [(source, Part("train", source.path, data.train_split)) for source in listed(data.train)]
    if not isinstance(data.eval, float):
        return found
    return [(source, replace(part, picked=_held_out(part, data.eval, seed, cache))) for source, part in found]


def _eval_parts(data: Data, train: list[tuple[Source, Part]]) -> list[tuple[Source, Part]]:
    """Return the parts of evaluation; a fraction is what each training source leaves out."""
    if isinstance(data.eval, float):
        return [(source, replace(part, name="eval", held_out=True)) for source, part in train]
    return [(source, Part("eval", source.path, data.eval_split)) for source in listed(data.eval)]


def _held_out(part: Part, share: float, seed: int, cache: Path | None) -> frozenset[int]:
    count = _row_count(part, cache)
    if count < 2:
        what = f"data.eval = {share} holds out training rows, but there is only {count}"
        raise DataError(Problem("too-few-rows", what, Place(part.source), fix="add rows, or leave out data.eval"))
    return frozenset(random.Random(seed).sample(range(count), min(count - 1, max(1, round(count * share)))))


def _row_count(part: Part, cache: Path | None) -> int:
    """Return how many rows a source has; kept, as counting reads all of them."""
    contents = store.source_fingerprint(part.source, part.split) if cache else None
    path = cache / f"{store.key_of('rows', contents, part.split)}.count.json" if cache and contents else None
    with FileLock(path.with_suffix(".lock")) if path else contextlib.nullcontext():
        with contextlib.suppress(OSError, ValueError):
            if path is not None:
                return int(path.read_text(encoding="utf-8"))
        faults = Faults()
        count = sum(1 for _ in part.rows(faults))
        faults.stop()
        if path is not None:
            rundir.write_text(path, str(count))
        return count


def _encoding(data: Data, source: Source, part: Part, tokenizer: Any, learns: frozenset[str] | None) -> Encoding:
    chosen = choose_format(data.format if source.format == "auto" else source.format, part, learns)
    answers_only = bool(getattr(data, chosen.loss_setting))
    return Encoding(chosen, tokenizer, answers_only, data.max_length, data.train_on_turns)


def _tokenised(readings: Sequence[Reading], cache: Path | None, data: Data) -> Iterator[Stored]:
    """Yield each source's rows of one part, from the cache where they are; no more than the recipe's most can need.

    Of a weighted mix each source may need so many, and a temperature asks for all, as the shares follow from their
    number: what the mix holds of them is cut to size there.
    """
    mixed = data.is_mixed and readings[0].part.name == "train"
    left = _most(data, readings[0].part.name)
    if mixed and data.mixing_temperature is not None:
        left = None
    for each in readings:
        if left == 0:
            return
        stored = _stored(replace(each.part, most=left), each.encoding, cache, data)
        yield stored
        if left is not None and not mixed:
            left = max(0, left - stored.audit.rows - stored.audit.left_out)


def _most(data: Data, name: str) -> int | None:
    """Return how many rows of `train` or `eval` the recipe wants at most."""
    return data.max_train_samples if name == "train" else data.max_eval_samples


def _stored(part: Part, encoding: Encoding, cache: Path | None, data: Data) -> Stored:
    views = encoding.format.views
    key, known = _key(part, encoding) if cache else ("", False)
    # Ranks wait here, on a file, and not in a process group, whose watchdog would end a run that tokenises for long.
    with FileLock(cache / f"{key}.lock") if cache and known else contextlib.nullcontext():
        found = tokens.find(cache, key, views) if cache and known else None
        if found is not None:
            return Stored(part, encoding, found[0], _audit_of(found[1], part), key)
        audit = Audit()
        ids = tokens.id_type(encoding.tokenizer)
        file = tokens.write(cache, key, views, ids, _kept_rows(part, encoding, audit, data))
        # Where the contents are unknown nobody reads the notes, and no lock keeps ranks from writing them at once.
        tokens.write_notes(cache if known else None, key, {"files": _files(part), "audit": audit.as_dict()})
        return Stored(part, encoding, file, audit, key if known else "")


def _files(part: Part) -> list[str]:
    return [str(path) for path in files_of(part.source)] if is_local(part.source) else []


def _audit_of(notes: Mapping[str, Any], part: Part) -> Audit:
    """Return what was noted; its examples under the names that the files have now, as they may have been moved."""
    names = dict(zip(notes["files"], _files(part), strict=True))
    audit = Audit.from_dict(notes["audit"])
    for kind, examples in audit.examples.items():
        audit.examples[kind] = [replace(each, file=names.get(each.file, each.file)) for each in examples]
    return audit


def _kept_rows(part: Part, encoding: Encoding, audit: Audit, data: Data) -> Iterator[tokens.Kept]:
    """Yield the part's tokenised rows in their order; DataError for bad rows, several at once."""
    faults = Faults()
    for kept, counted, problems in outcomes(part.rows(faults), encoding, tuple(_files(part)), _processes(data)):
        for problem in problems:
            faults.add(problem)
        audit.add(counted)
        if not len(faults):  # otherwise the run is lost already: only look for more bad rows
            yield from kept
    faults.stop()
    if not audit.rows:
        raise DataError(_nothing_to_learn(part, encoding, audit))


def _processes(data: Data) -> int:
    """Return how many processes tokenise; a recipe that nobody decided is worked on alone."""
    return 1 if data.num_proc == "auto" else data.num_proc


def _key(part: Part, encoding: Encoding) -> tuple[str, bool]:
    """Return the name of the part's stored rows, and whether it tells their contents."""
    contents = store.source_fingerprint(part.source, part.split)
    picked = sorted(part.picked) if part.picked is not None else None
    key = store.key_of(
        store.tokenizer_fingerprint(encoding.tokenizer),
        contents or part.source,
        [part.split, picked, part.held_out, part.most],
        [encoding.format.name, encoding.answers_only, encoding.max_length, encoding.train_on_turns],
    )
    return key, contents is not None


def _sequences(stored: tuple[Stored, ...], sources: list[Source], data: Data, seed: int) -> Sequences:
    """Return the rows of one part, mixed where there are weights (evaluation sees every row once)."""
    files, counts = [each.file for each in stored], [len(each.file) for each in stored]
    weights = weights_of([source.weight for source in sources[: len(files)]], counts, data.mixing_temperature)
    mixed = mix(counts, weights if sources else None, stop=data.mixing_stop, seed=seed)
    # Here too for evaluation: a plain text of one row may have become many.
    mixed = mixed.first(_most(data, stored[0].part.name))
    views = stored[0].encoding.format.views
    return sequences(
        files,
        names_of([each.part for each in stored]),
        mixed,
        views,
        capacity=data.max_length if data.packing else None,
    )


def names_of(parts: Sequence[Part]) -> list[str]:
    """Return what each source is called in the metrics: the end of its name, as much of it as tells them apart."""
    paths = [_spelt_out(part.source) for part in parts]
    for depth in range(1, 4):
        names = ["/".join([*path.parts[-depth:-1], path.stem]) for path in paths]
        if len(set(names)) == len(names):
            return names
    # A source may be there twice, as a way to see it twice as often.
    return [f"{path} ({at})" if paths.count(path) > 1 else str(path) for at, path in enumerate(paths, start=1)]


def _spelt_out(source: str) -> Path:
    """Return a source's path so that it ends in a name, which `.` does not have."""
    path = Path(source).expanduser()
    return path.resolve() if path.name in ("", "..") else path


def _nothing_to_learn(part: Part, encoding: Encoding, audit: Audit) -> Problem:
    cut = audit.counts["answer-cut-off"]
    if cut:
        why = f"in {cut} rows the answer begins beyond data.max_length = {encoding.max_length}"
        fix = f"raise data.max_length: the longest row has {audit.longest} tokens"
    else:
        why = "no row holds an answer that is learned: assistant turns are missing, empty, or marked as not trained"
        fix = "look at the roles in the file, or set data.assistant_only_loss: false"
    what = f"nothing to learn from: none of the {audit.left_out} rows has a token that counts in the loss"
    return Problem("nothing-to-learn", what, Place(part.source), why=why, fix=fix)


def _problems(stored: Stored, data: Data) -> list[Problem]:
    return [_problem(each) for each in stored.found(data.audit_ignore) if each.severity == "fatal"]


def _told(parts: Mapping[str, Sequence[Stored]], copies: Mapping[str, Copies], data: Data) -> Iterator[str]:
    """Yield what is odd about the rows but stops no run, a line each."""
    for name, every in parts.items():
        found = [one for each in every for one in each.found(data.audit_ignore)]
        for one in (*found, *set_findings(parts, copies, name, data.audit_ignore)):
            shown = f"; the first is {one.examples[0]}" if one.examples else ""
            if one.severity != "fatal":
                yield f"{one.severity}: {name}: {one.says} ({one.finding.kind}){shown}; {one.finding.fix}"


def _problem(found: Found) -> Problem:
    first = found.examples[0] if found.examples else None
    fix = f"{found.finding.fix}; if it is as it should be: data.audit_ignore: [{found.finding.kind}]"
    where = first.place if first else None
    return Problem(found.finding.kind, found.says, where, why=found.finding.why, fix=fix)


def _prompts(reading: Reading) -> tuple[Prompt, ...]:
    faults = Faults()
    prompts: list[Prompt] = []
    for row in reading.part.rows(faults):
        views = reading.encoding.conversations(row, faults)
        if views is None:
            continue
        conversation = views[0]
        answers = [at for at, turn in enumerate(conversation.turns) if turn.role == "assistant" and turn.trained]
        text = conversation.prompt or " ".join(conversation.completion.split()[:_OPENING_WORDS])
        if answers and answers[0]:
            prompts.append(Conversation(conversation.turns[: answers[0]], tools=conversation.tools))
        elif text:
            prompts.append(PlainText(text))
        if len(prompts) == _PROMPTS:
            break
    return tuple(prompts)
