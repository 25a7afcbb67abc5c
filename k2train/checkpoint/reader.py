"""Reading a checkpoint by name, whole tensors or row ranges, every byte checked before it is handed
out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2train.checkpoint.errors import CheckpointError
from k2train.checkpoint.manifest import Manifest, PieceEntry, ShardEntry, TensorEntry, read_manifest
from k2train.checkpoint.safetensors_file import (
    DTYPES,
    FormatError,
    Slot,
    file_sha256,
    read_header,
    read_into,
    read_tensor,
)
from k2train.config.errors import nearest

_REMEDY = "use an older checkpoint, or copy the shard again from where it was written"


class Checkpoint:
    """A complete checkpoint on disk. Nothing is read before it is asked for; one tensor at a time
    is in memory."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._header = functools.cache(self._read_header)

    @property
    def meta(self) -> Mapping[str, Any]:
        """What the writer recorded: step, model, dtype, ..."""
        return self.manifest.meta

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return list(self.manifest.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.manifest.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The type the tensor is stored in."""
        return DTYPES[self._entry(name).dtype]

    def load(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor on the CPU, or its rows from rows[0] up to, not including, rows[1].

        Raises CheckpointError for an unknown name and for a missing, short or damaged shard.
        """
        entry = self._entry(name)
        start, stop = rows if rows is not None else (0, entry.shape[0] if entry.shape else 1)
        if rows is not None and not (entry.shape and 0 <= start <= stop <= entry.shape[0]):
            raise ValueError(f"{name}: rows {start} to {stop} of a tensor of shape {entry.shape}")
        if len(entry.pieces) == 1 and rows is None:
            return self._load_piece(*entry.pieces[0])
        out = torch.empty((stop - start, *entry.shape[1:]), dtype=DTYPES[entry.dtype])
        for shard, piece in entry.pieces:
            self._copy_rows(shard, piece, out, start, stop)
        return out

    def verify(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Check every shard against its SHA-256. Raises CheckpointError for the first that differs,
        naming it."""
        for shard in self.manifest.shards:
            self.check_size(shard)
            if self._guarded(shard, file_sha256, on_bytes) != shard.sha256:
                raise CheckpointError(
                    self.directory / shard.file, "its SHA-256 is not the one in manifest.json", _REMEDY
                )

    def check_size(self, shard: ShardEntry) -> None:
        """Raise CheckpointError if the shard is missing or has another size than was written."""
        path = self.directory / shard.file
        if not path.is_file():
            raise CheckpointError(path, "this shard of the checkpoint is missing", _REMEDY)
        size = path.stat().st_size
        if size != shard.num_bytes:
            raise CheckpointError(
                path, f"this shard has {size} bytes where {shard.num_bytes} were written", _REMEDY
            )

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[name]
        except KeyError:
            raise CheckpointError(
                self.directory, f"holds no tensor {name}", nearest(name, self.names())
            ) from None

    def _copy_rows(self, shard: int, piece: PieceEntry, out: Tensor, start: int, stop: int) -> None:
        """Copy the rows of `piece` that lie in start..stop to their place in `out` (row 0 is row
        `start`)."""
        rows = piece.rows if piece.rows is not None else piece.shape[0]
        first, last = max(start, piece.start), min(stop, piece.start + rows)
        if first >= last:
            return
        target = out[first - start : last - start]
        if last - first == rows:
            slot = self._slot(shard, piece)
            self._check(shard, piece, self._guarded(self._shard(shard), read_into, slot, target))
        else:
            target.copy_(self._load_piece(shard, piece)[first - piece.start : last - piece.start])

    def _load_piece(self, shard: int, piece: PieceEntry) -> Tensor:
        tensor, crc32 = self._guarded(self._shard(shard), read_tensor, self._slot(shard, piece))
        self._check(shard, piece, crc32)
        return tensor

    def _check(self, shard: int, piece: PieceEntry, crc32: int) -> None:
        if crc32 != piece.crc32:
            path = self.directory / self._shard(shard).file
            raise CheckpointError(
                path, f"the bytes of {piece.name} in this shard are damaged (CRC-32 differs)", _REMEDY
            )

    def _slot(self, shard: int, piece: PieceEntry) -> Slot:
        slot = self._header(shard).get(piece.key)
        shape = piece.shape if piece.rows is None else (piece.rows, *piece.shape[1:])
        if slot is None or slot.shape != shape or slot.dtype != DTYPES[piece.dtype]:
            path = self.directory / self._shard(shard).file
            raise CheckpointError(
                path, f"this shard does not hold {piece.key} as manifest.json says", _REMEDY
            )
        return slot

    def _shard(self, index: int) -> ShardEntry:
        return self.manifest.shards[index]

    def _read_header(self, index: int) -> dict[str, Slot]:
        shard = self._shard(index)
        self.check_size(shard)
        return self._guarded(shard, read_header)

    def _guarded(self, shard: ShardEntry, read: Callable[..., Any], *args: Any) -> Any:
        path = self.directory / shard.file
        try:
            return read(path, *args)
        except FileNotFoundError:
            raise CheckpointError(path, "this shard of the checkpoint is missing", _REMEDY) from None
        except FormatError as error:
            raise CheckpointError(path, f"this shard is damaged: {error}", _REMEDY) from error
        except OSError as error:
            raise CheckpointError(path, f"this shard cannot be read: {error}", _REMEDY) from error


def open_checkpoint(directory: Path | str) -> Checkpoint:
    """The checkpoint in `directory`, its manifest read. Raises CheckpointError where there is none
    or it is damaged."""
    directory = Path(directory)
    return Checkpoint(directory, read_manifest(directory))
