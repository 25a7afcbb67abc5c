"""Finds the text files of a build and cuts them into tasks.

A task is some 8 MB of input: a byte range of a .jsonl file, a row group of a .parquet file, or
several small files. The cut depends on the files alone, so any number of workers makes the same
dataset.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from k2train.config.errors import ConfigError

TASK_BYTES = 8 << 20

Kind = Literal["txt", "jsonl", "parquet"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Part of a file that one worker reads: bytes start .. stop of text, or row groups start ..
    stop of Parquet.

    first_row: Parquet rows before it. num_bytes: its share of the file, for progress.
    """

    path: str
    kind: Kind
    gzipped: bool
    start: int
    stop: int
    num_bytes: int
    first_row: int = 0


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The files named, and those below the directories named in order of their path. Raises
    ConfigError.

    Files of other kinds below a directory are passed over; named directly they are an error.
    """
    files: list[Path] = []
    for index, word in enumerate(inputs):
        files += _files_of(Path(word).expanduser(), f"input[{index}]")
    seen: set[Path] = set()
    for file in files:
        resolved = file.resolve()
        if resolved in seen:
            raise ConfigError("input", file, "is named twice", "leave one of the two out")
        seen.add(resolved)
    return files


def cut_tasks(files: Iterable[Path], text_key: str) -> list[tuple[Unit, ...]]:
    """All files as tasks, in order. Raises ConfigError for a Parquet file that cannot be read or
    lacks the column."""
    tasks: list[tuple[Unit, ...]] = []
    pending: list[Unit] = []
    size = 0
    for file in files:
        for unit in _units(file, text_key):
            pending.append(unit)
            size += unit.num_bytes
            if size >= TASK_BYTES:
                tasks.append(tuple(pending))
                pending, size = [], 0
    return [*tasks, tuple(pending)] if pending else tasks


def kind_of(path: Path) -> tuple[Kind, bool] | None:
    """(kind, gzipped) by the file's name; None for other files."""
    name = path.name.lower()
    gzipped = name.endswith(".gz")
    stem = name[: -len(".gz")] if gzipped else name
    if stem.endswith(".txt"):
        return "txt", gzipped
    if stem.endswith((".jsonl", ".ndjson")):
        return "jsonl", gzipped
    return ("parquet", False) if stem.endswith(".parquet") and not gzipped else None


def _files_of(path: Path, field: str) -> list[Path]:
    kinds = ".txt, .jsonl, .txt.gz, .jsonl.gz or .parquet"
    if path.is_file():
        if kind_of(path) is None:
            raise ConfigError(field, path, "is of no kind that can be read", f"its name must end in {kinds}")
        return [path]
    if not path.is_dir():
        raise ConfigError(field, path, "not found", "give files or directories that exist")
    found = sorted(_walk(path), key=lambda file: file.relative_to(path).as_posix())
    if not found:
        raise ConfigError(field, path, f"holds no {kinds} file", "check the directory")
    return found


def _walk(directory: Path) -> Iterator[Path]:
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and kind_of(path) is not None and path.is_file():
                yield path


def _units(file: Path, text_key: str) -> Iterator[Unit]:
    kind = kind_of(file)
    assert kind is not None  # find_files lets no other file through
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ConfigError("input", file, f"cannot be read: {error.strerror}") from error
    if kind[0] == "parquet":
        yield from _parquet_units(file, text_key, size)
    elif kind == ("jsonl", False):
        for start in range(0, max(size, 1), TASK_BYTES):
            stop = min(start + TASK_BYTES, size)
            yield Unit(str(file), "jsonl", False, start, stop, stop - start)
    else:
        yield Unit(str(file), kind[0], kind[1], 0, size, size)


def _parquet_units(file: Path, text_key: str, size: int) -> Iterator[Unit]:
    # pyarrow takes half a second to import and only Parquet needs it
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        first = str(error).splitlines()[0]
        raise ConfigError("input", file, f"is not a readable Parquet file: {first}") from error
    with parquet:
        schema = parquet.schema_arrow
        names = ", ".join(schema.names)
        if text_key not in schema.names:
            raise ConfigError("text_key", text_key, f"is no column of {file}", f"its columns are {names}")
        if not _holds_text(schema.field(text_key).type):
            raise ConfigError(
                "text_key",
                text_key,
                f"holds {schema.field(text_key).type} in {file}, not text",
                f"its columns are {names}",
            )
        groups = parquet.metadata.num_row_groups
        row = 0
        for group in range(groups):
            yield Unit(str(file), "parquet", False, group, group + 1, size // groups, first_row=row)
            row += parquet.metadata.row_group(group).num_rows


def _holds_text(column: object) -> bool:
    import pyarrow as pa

    value = column.value_type if isinstance(column, pa.DictionaryType) else column
    return pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
