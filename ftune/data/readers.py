"""One reader for each kind of file: rows with the number under which an editor or viewer finds them."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ftune.data.faults import Faults, fault
from ftune.errors import DataError, Problem

_SHOWN = 200
"""A bad line is shown up to here; documents run to megabytes."""

NumberedRows = Iterator[tuple[int, dict[str, Any]]]


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """Yield decoded lines with their numbers; only a newline ends one, as editors count."""
    try:
        with _open(path) as stream:
            for number, raw in enumerate(stream, start=1):
                line = _decoded(raw, path, number, faults)
                if line is not None:
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(fault(f"cannot unpack {path.name}: {error}", str(path), fix="copy the file again")) from error


def _decoded(raw: bytes, path: Path, number: int, faults: Faults) -> str | None:
    if number == 1 and (raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:2]):
        fix = f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > converted"
        raise DataError(
            fault("the file is written in UTF-16", str(path), number, why="ftune reads UTF-8 only", fix=fix)
        )
    try:
        # Windows programs put a byte order mark before the first line.
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} of the line ({raw[error.start]:#04x}) is not valid UTF-8"
        fix = f"convert it: iconv -f LATIN1 -t UTF-8 {path.name} > converted"
        faults.add(fault(what, str(path), number, why="ftune reads UTF-8 only", fix=fix))
        return None


def _json_lines(path: Path, faults: Faults) -> NumberedRows:
    for number, line in _lines(path, faults):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.add(_bad_json(path, number, line.rstrip("\r\n"), error))
            continue
        if isinstance(value, str):
            value = {"text": value}
        if isinstance(value, dict):
            yield number, value
        else:
            faults.add(_not_an_object(path, number, value))


def _bad_json(path: Path, number: int, line: str, error: Exception) -> Problem:
    column = error.colno if isinstance(error, json.JSONDecodeError) else 1
    reason = _reason(error)
    fix, bare = "mend the line, or delete it", line.strip()
    if bare.startswith("[{") or (number == 1 and bare in ("[", "{")):
        fix = "rename the file to .json, or write each row as one object on one line"
    elif column > len(line.rstrip()):
        fix = "the line ends too early: was the file cut off while it was copied?"
    elif line[column - 1 : column] == "'":
        fix = "JSON wants double quotes: \"text\", not 'text'"
    shown = line[:_SHOWN] if column <= _SHOWN else ""
    near = "" if shown else f", near `{line[max(0, column - 40) : column + 20]}`"
    return fault(f"not valid JSON: {reason}{near}", str(path), number, column=column, text=shown, fix=fix)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _not_an_object(path: Path, number: int, value: Any) -> Problem:
    fix = 'write {"column": value, ...}'
    if isinstance(value, list):
        fix = "a list of rows belongs into a file ending in .json; " + fix
    return fault(f"the row is not an object but {json.dumps(value)[:60]}", str(path), number, fix=fix)


def _json(path: Path, faults: Faults) -> NumberedRows:
    """Yield the rows of one JSON value; a `.json` that holds JSON lines, as many do, is read as such."""
    if _holds_json_lines(path):
        yield from _json_lines(path, faults)
        return
    text = "".join(line for _, line in _lines(path, faults))
    faults.stop()
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1][:_SHOWN]
        place: dict[str, Any] = {"column": error.colno, "text": line if error.colno <= _SHOWN else ""}
        raise DataError(
            fault(f"not valid JSON: {error.msg}", str(path), error.lineno, fix="mend it", **place)
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise DataError(fault(f"cannot read the JSON: {_reason(error)}", str(path), fix="mend it")) from None
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            what = f"the file is an object with {len(lists)} lists ({', '.join(lists) or 'none'}), not a list of rows"
            raise DataError(fault(what, str(path), fix="keep one list of rows in it"))
        value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(fault("the file is not a list of rows", str(path), fix="write [{...}, {...}]"))
    for number, item in enumerate(value, start=1):
        if isinstance(item, (dict, str)):
            yield number, item if isinstance(item, dict) else {"text": item}
        else:
            faults.add(_not_an_object(path, number, item))


def _holds_json_lines(path: Path) -> bool:
    filled = (line for _, line in _lines(path, Faults()) if line.strip())
    try:
        return isinstance(json.loads(next(filled, "")), dict) and next(filled, None) is not None
    except (ValueError, RecursionError):
        return False


def _table(path: Path, faults: Faults, delimiter: str = ",") -> NumberedRows:
    # Python's own limit of 128 KiB per field is less than a long document.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in _lines(path, faults)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    before = 0
    try:
        for fields in reader:
            number, before = before + 1, reader.line_num
            if not fields:
                continue
            if header is None:
                header = _header(path, fields)
            elif len(fields) != len(header):
                what = f"the row has {len(fields)} fields, the header has {len(header)}: {', '.join(header)}"
                faults.add(fault(what, str(path), number, fix="put quotes around text that holds the separator"))
            else:
                yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(fault(f"cannot read the table: {error}", str(path), before + 1, fix="mend the row")) from error


def _header(path: Path, fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    if len(set(names)) != len(names):
        raise DataError(fault(f"a column name is there twice: {', '.join(names)}", str(path), 1, fix="rename one"))
    return names


def _tabs(path: Path, faults: Faults) -> NumberedRows:
    return _table(path, faults, delimiter="\t")


def _text(path: Path, faults: Faults) -> NumberedRows:
    for number, line in _lines(path, faults):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


def _columnar(path: Path, faults: Faults) -> NumberedRows:
    import pyarrow

    number = 0
    try:
        for batch in _batches(path):
            for values in batch.to_pylist():
                number += 1
                yield number, values
    except pyarrow.ArrowInvalid as error:
        what = f"cannot read {path.name}: {str(error).splitlines()[0]}"
        raise DataError(fault(what, str(path), fix="copy or write the file again")) from error


def _batches(path: Path) -> Iterator[Any]:
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=256)
        return
    import pyarrow

    with pyarrow.memory_map(str(path)) as stream:
        # Arrow has two file kinds: `datasets` writes the stream, Feather and `RecordBatchFileWriter` the other.
        if bytes(stream.read(6)) == b"ARROW1":
            reader = pyarrow.ipc.open_file(stream)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            stream.seek(0)
            yield from pyarrow.ipc.open_stream(stream)


Reader = Callable[[Path, Faults], NumberedRows]

READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _tabs,
    ".txt": _text,
    ".parquet": _columnar,
    ".arrow": _columnar,
}
"""Ending: what reads it."""
