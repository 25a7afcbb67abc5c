"""Writing a checkpoint: named tensors into shards, by one writer or many, then one commit.

One writer calls `write_checkpoint`. Many ranks on a shared file system go the same way in three
steps, with barriers between them: rank 0 `begin`s, every rank `write_shards` of the tensors it owns
under its own prefix, rank 0 `commit`s what all prefixes left. A rank may own a row range only
(`RowPiece`); the commit checks that every row of every tensor was written exactly once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, Union

from torch import Tensor

from k2train.checkpoint.errors import CheckpointError
from k2train.checkpoint.manifest import (
    MANIFEST,
    PieceEntry,
    ShardEntry,
    entries_text,
    manifest_text,
    merge,
    parse_entries,
)
from k2train.checkpoint.safetensors_file import DTYPE_NAMES, LazyTensor, lazy, write_file
from k2train.checkpoint.staging import publish, restore_replaced, staged, sync_directory, write_text

DEFAULT_SHARD_BYTES = 4 << 30
_ENTRIES = ".entries.json"


class Sized(Protocol):
    """Anything that takes a known number of bytes in a file."""

    @property
    def num_bytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


@dataclasses.dataclass(frozen=True)
class RowPiece:
    """Rows `start`, `start + 1`, ... of a tensor that has `num_rows` rows in all: what one owner
    holds of it."""

    tensor: Union[Tensor, LazyTensor]  # noqa: UP007
    start: int
    num_rows: int


Storable = Union[Tensor, LazyTensor, RowPiece]  # noqa: UP007


def write_checkpoint(
    directory: Path | str,
    tensors: Iterable[tuple[str, Storable]],
    meta: Mapping[str, Any],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write a whole checkpoint from one process and return its absolute path.

    tensors: (name, tensor) pairs; any device, none may change until this returns. They are taken
    one by one, and only
        one at a time is copied to the host. meta: what JSON can hold.
    An older checkpoint of the same name is replaced once the new one is complete. On any exception
    nothing is left.
    Raises CheckpointError if `directory` holds something that is not a checkpoint, OSError from the
    disk.
    """
    directory = Path(directory).resolve()
    check_replaceable(directory)
    with staged(directory) as temporary:
        entries = write_shards(temporary, "rank00000", tensors, max_shard_bytes)
        commit(temporary, directory, entries, meta)
    return directory


def write_shards(
    temporary: Path,
    prefix: str,
    tensors: Iterable[tuple[str, Storable]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> list[ShardEntry]:
    """Write one writer's tensors as `<prefix>-00000.safetensors`, ... into `temporary`, and say
    what is where.

    The result is also left in the directory for `read_entries`. A shard holds at most
    `max_shard_bytes`, or one larger tensor. `on_bytes` is told of every tensor's size once it is
    written.
    """
    entries: list[ShardEntry] = []
    for group in group_by_bytes(_slabs(tensors), max_shard_bytes):
        file = f"{prefix}-{len(entries):05d}.safetensors"
        written = write_file(temporary / file, [(slab.key, slab.tensor) for slab in group], None, on_bytes)
        pieces = tuple(slab.entry(written.crc32[slab.key]) for slab in group)
        entries.append(ShardEntry(file, written.num_bytes, written.sha256, pieces))
        # The next shard is gathered before this name is bound again (and enumerate would hold on to
        # the group as well).
        del group
    write_text(temporary / (prefix + _ENTRIES), entries_text(entries))
    sync_directory(temporary)
    return entries


def read_entries(temporary: Path, prefixes: Sequence[str]) -> list[ShardEntry]:
    """What the writers with these prefixes left in `temporary`. Raises CheckpointError for one that
    did not finish."""
    entries = []
    for prefix in prefixes:
        path = temporary / (prefix + _ENTRIES)
        if not path.is_file():
            raise CheckpointError(
                temporary,
                f"writer {prefix} did not finish its shards",
                "all ranks must see the same directory",
            )
        entries += parse_entries(path.read_text(encoding="utf-8"))
    return entries


def commit(
    temporary: Path, directory: Path | str, entries: Sequence[ShardEntry], meta: Mapping[str, Any]
) -> None:
    """Write the manifest of all writers' `entries` and rename `temporary` to `directory`; one rank
    calls it, last.

    Raises ValueError, a bug of ours, if a tensor was written twice or not wholly; CheckpointError
    if `directory` holds something that is not a checkpoint.
    """
    directory = Path(directory).resolve()
    check_replaceable(directory)
    write_manifest(temporary, entries, meta)
    for path in temporary.glob("*" + _ENTRIES):
        path.unlink()
    publish(temporary, directory)


def write_manifest(temporary: Path, entries: Sequence[ShardEntry], meta: Mapping[str, Any]) -> None:
    """Write the manifest only, so that `temporary` can be opened and verified before it is
    committed."""
    write_text(temporary / MANIFEST, manifest_text(merge(entries, meta)))


def check_replaceable(directory: Path) -> None:
    """Raise CheckpointError unless `directory` is absent, empty or an older checkpoint."""
    restore_replaced(directory)
    if not directory.exists() or (directory / MANIFEST).is_file():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise CheckpointError(
            directory,
            "exists and is not a checkpoint, so it is not replaced",
            "remove it or give another directory",
        )


@dataclasses.dataclass(frozen=True)
class _Slab:
    """A tensor or row range on its way into a shard."""

    name: str
    key: str
    tensor: LazyTensor
    shape: tuple[int, ...]
    start: int
    rows: int | None

    @property
    def num_bytes(self) -> int:
        return self.tensor.num_bytes

    def entry(self, crc32: int) -> PieceEntry:
        dtype = DTYPE_NAMES[self.tensor.dtype]
        return PieceEntry(self.name, dtype, self.shape, self.key, crc32, self.start, self.rows)


def _slabs(tensors: Iterable[tuple[str, Storable]]) -> Iterator[_Slab]:
    for name, item in tensors:
        if not isinstance(item, RowPiece):
            whole = lazy(item)
            yield _Slab(name, name, whole, whole.shape, 0, None)
            continue
        piece = lazy(item.tensor)
        rows, shape = piece.shape[0], (item.num_rows, *piece.shape[1:])
        if item.start < 0 or item.start + rows > item.num_rows:
            raise ValueError(f"{name}: rows {item.start} to {item.start + rows} of {item.num_rows}")
        if rows == item.num_rows:
            yield _Slab(name, name, piece, shape, 0, None)
        elif rows:
            yield _Slab(name, f"{name}@{item.start}", piece, shape, item.start, rows)


def group_by_bytes(items: Iterable[T], max_bytes: int) -> Iterator[list[T]]:
    """Consecutive runs of items (each with `num_bytes`) of at most `max_bytes`, or of one larger
    item."""
    group: list[T] = []
    size = 0
    for item in items:
        if group and size + item.num_bytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(item)
        size += item.num_bytes
    if group:
        yield group
