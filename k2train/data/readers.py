"""Reads the documents of a unit, one after another, and reports what it cannot read by line.

Every line of a .jsonl file and every row of a .parquet file becomes either a document or a
`BadLine`; nothing is passed over. A .txt file is one document, unless it holds lines that consist
of `<|endoftext|>`, the usual separator, or is so long that it is cut at the next line end (a
document is held in memory whole).
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from k2train.config.errors import ConfigError
from k2train.data.sources import Unit

SEPARATOR = b"<|endoftext|>"
MAX_TEXT_BYTES = 64 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line (from 1, within its unit) or Parquet row (from 1, within its file) that is no
    document."""

    path: str
    line: int
    reason: str


@dataclasses.dataclass
class LineCount:
    """Lines seen in a unit, so that the next unit of the file can be numbered on."""

    lines: int = 0


def read_unit(unit: Unit, text_key: str, count: LineCount) -> Iterator[tuple[int, str] | BadLine]:
    """(line, text) of each document, or what is wrong with it. Raises ConfigError if the file
    cannot be read further."""
    try:
        if unit.kind == "parquet":
            yield from _read_parquet(unit, text_key)
        elif unit.kind == "jsonl":
            yield from _read_jsonl(unit, text_key, count)
        else:
            yield from _read_text(unit, count)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            "input",
            unit.path,
            f"cannot be read after line {count.lines}: {error}",
            "the file is damaged: fetch it again, or leave it out",
        ) from error


def _lines(unit: Unit) -> Iterator[bytes]:
    """The lines that begin inside the unit. A range that does not begin a line leaves the rest of
    it to the one before."""
    opener: Any = gzip.open if unit.gzipped else open
    with opener(unit.path, "rb") as stream:
        position = max(unit.start - 1, 0)
        if position:
            stream.seek(position)
        if unit.start:
            position += len(stream.readline())
        for line in stream:
            if not unit.gzipped and position >= unit.stop:
                return
            yield line.removeprefix(_BYTE_ORDER_MARK) if position == 0 else line
            position += len(line)


def _read_jsonl(unit: Unit, text_key: str, count: LineCount) -> Iterator[tuple[int, str] | BadLine]:
    for line in _lines(unit):
        count.lines += 1
        text, reason = parse_json_line(line, text_key)
        yield (count.lines, text) if text is not None else BadLine(unit.path, count.lines, reason)


def parse_json_line(line: bytes, text_key: str) -> tuple[str | None, str]:
    """(text, "") of a line, or (None, what is wrong with it)."""
    if not line.strip():
        return None, "blank line"
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, _not_utf8(error)
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    if not isinstance(record, dict):
        return None, f"not a JSON object but {_json_type(record)}"
    if text_key not in record:
        return None, f"no key {text_key!r}"
    return _checked_text(record[text_key], text_key)


def _checked_text(text: Any, name: str) -> tuple[str | None, str]:
    if not isinstance(text, str):
        return None, f"{name!r} is {_json_type(text)}, not text"
    if not text:
        return None, f"{name!r} is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return None, f"{name!r} holds half a surrogate pair, which is no Unicode text"
    return text, ""


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"


def _read_text(unit: Unit, count: LineCount) -> Iterator[tuple[int, str] | BadLine]:
    found = False
    parts: list[bytes] = []
    size = 0
    for line in _lines(unit):
        count.lines += 1
        separates = line.strip() == SEPARATOR
        if separates or size >= MAX_TEXT_BYTES:
            yield from _text_document(unit, parts, count.lines - len(parts))
            found = found or bool(parts)
            parts, size = [], 0
        if not separates:
            parts.append(line)
            size += len(line)
    if parts:
        yield from _text_document(unit, parts, count.lines - len(parts) + 1)
    elif not found:
        yield BadLine(unit.path, max(count.lines, 1), "holds no text")


def _text_document(unit: Unit, parts: list[bytes], first_line: int) -> Iterator[tuple[int, str] | BadLine]:
    data = b"".join(parts)
    if not data:
        return
    try:
        yield first_line, data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        reason = f"not UTF-8: byte 0x{data[error.start]:02x}; the document from line {first_line} is left out"
        yield BadLine(unit.path, line, reason)


def _read_parquet(unit: Unit, text_key: str) -> Iterator[tuple[int, str] | BadLine]:
    # pyarrow takes half a second to import and only Parquet needs it
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = unit.first_row
    try:
        with pq.ParquetFile(unit.path) as parquet:
            groups = list(range(unit.start, unit.stop))
            for batch in parquet.iter_batches(batch_size=1024, row_groups=groups, columns=[text_key]):
                # as bytes, because pyarrow would raise for the whole batch on the first value that
                # is not UTF-8
                for value in batch.column(0).cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
                    row += 1
                    text, reason = _parquet_text(value, text_key)
                    yield (row, text) if text is not None else BadLine(unit.path, row, reason)
    except pa.ArrowException as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            "input",
            unit.path,
            f"cannot be read after row {row}: {first}",
            "the file is damaged: fetch it again, or leave it out",
        ) from error


def _parquet_text(value: bytes | None, text_key: str) -> tuple[str | None, str]:
    if value is None:
        return None, f"{text_key!r} is null, not text"
    try:
        return _checked_text(value.decode(), text_key)
    except UnicodeDecodeError as error:
        return None, _not_utf8(error)
