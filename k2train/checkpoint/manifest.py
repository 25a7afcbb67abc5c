"""The manifest of a checkpoint: which shard holds which tensor or rows of it, and the checksums.

    {"sha256": "...", "format": "k2train checkpoint", "version": 1, "meta": {...},
     "shards":  [{"file": "rank00000-00001.safetensors", "bytes": 1234, "sha256": "..."}, ...],
     "tensors": {"master/lm_head.weight": {"dtype": "F32", "shape": [163840, 7168],
                 "pieces": [{"shard": 0, "key": "...", "start": 0, "rows": 10240, "crc32": 123},
                     ...]}, ...}}

A piece without "rows" is the whole tensor. SHA-256 covers each file as a whole and can be checked
with common tools (it runs at disk speed on processors with SHA instructions); the CRC-32 of each
piece lets every single load be checked without reading the rest of its shard. The first entry is
the SHA-256 of the manifest's own JSON without it. Nothing here says which layout wrote the
checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from k2train.checkpoint.errors import CheckpointError
from k2train.checkpoint.safetensors_file import DTYPES

MANIFEST = "manifest.json"
FORMAT = "k2train checkpoint"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class PieceEntry:
    """A whole tensor, or `rows` rows of it from row `start` on, under `key` in a shard.

    shape is that of the whole tensor; rows is None where the piece is the whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    key: str
    crc32: int
    start: int = 0
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One file of a checkpoint and what it holds."""

    file: str
    num_bytes: int
    sha256: str
    pieces: tuple[PieceEntry, ...]


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor and its pieces, each with the index of its shard, in row order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, PieceEntry], ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents."""

    meta: Mapping[str, Any]
    shards: tuple[ShardEntry, ...]
    tensors: Mapping[str, TensorEntry]


def merge(shards: Iterable[ShardEntry], meta: Mapping[str, Any]) -> Manifest:
    """The manifest of shards from any number of writers.

    Raises ValueError, a bug of ours, if a tensor was written twice, differently, or with rows
    missing.
    """
    ordered = tuple(sorted(shards, key=lambda shard: shard.file))
    found: dict[str, list[tuple[int, PieceEntry]]] = {}
    for index, shard in enumerate(ordered):
        for piece in shard.pieces:
            found.setdefault(piece.name, []).append((index, piece))
    return Manifest(dict(meta), ordered, {name: _tensor_entry(name, found[name]) for name in sorted(found)})


def _tensor_entry(name: str, pieces: list[tuple[int, PieceEntry]]) -> TensorEntry:
    first = pieces[0][1]
    if any((piece.dtype, piece.shape) != (first.dtype, first.shape) for _, piece in pieces):
        raise ValueError(f"{name} was written with different types or shapes")
    pieces = sorted(pieces, key=lambda item: item[1].start)
    if any(piece.rows is None for _, piece in pieces):
        if len(pieces) > 1:
            raise ValueError(f"{name} was written {len(pieces)} times")
        return TensorEntry(first.dtype, first.shape, tuple(pieces))
    position = 0
    for _, piece in pieces:
        if piece.start != position:
            what = "are missing" if piece.start > position else "were written twice"
            raise ValueError(
                f"{name}: rows from {min(position, piece.start)} to {max(position, piece.start)} {what}"
            )
        position += piece.rows or 0
    if position != first.shape[0]:
        raise ValueError(f"{name}: rows from {position} to {first.shape[0]} are missing")
    return TensorEntry(first.dtype, first.shape, tuple(pieces))


def manifest_text(manifest: Manifest) -> str:
    """The JSON of a manifest. Raises TypeError for a meta that JSON cannot hold."""
    tensors = {
        name: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "pieces": [{"shard": index, **_piece_dict(name, piece)} for index, piece in entry.pieces],
        }
        for name, entry in manifest.tensors.items()
    }
    shards = [{"file": s.file, "bytes": s.num_bytes, "sha256": s.sha256} for s in manifest.shards]
    head = {"format": FORMAT, "version": VERSION, "meta": dict(manifest.meta)}
    body = {**head, "shards": shards, "tensors": tensors}
    return json.dumps({"sha256": _digest(body), **body}) + "\n"


def _digest(body: Mapping[str, Any]) -> str:
    # Python's JSON keeps the order of keys and the exact value of floats, so reading and writing
    # again gives the same text.
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _piece_dict(name: str, piece: PieceEntry) -> dict[str, Any]:
    entry: dict[str, Any] = {"crc32": piece.crc32}
    if piece.key != name:
        entry["key"] = piece.key
    if piece.rows is not None:
        entry |= {"start": piece.start, "rows": piece.rows}
    return entry


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the checkpoint in `directory`. Raises CheckpointError where there is none or
    it is damaged."""
    path = directory / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(directory, *_absence(directory)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(directory, f"its {MANIFEST} cannot be read: {error}", _REMEDY) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(directory, f"its {MANIFEST} is not that of a k2train checkpoint")
    if data.get("version") != VERSION:
        raise CheckpointError(
            directory,
            f"is of format version {data.get('version')}, this program reads {VERSION}",
            "use the version of k2train that wrote it",
        )
    if data.pop("sha256", None) != _digest(data):
        raise CheckpointError(directory, f"its {MANIFEST} is damaged (its own SHA-256 differs)", _REMEDY)
    try:
        return _parse(data)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            directory, f"its {MANIFEST} is damaged ({type(error).__name__}: {error})", _REMEDY
        ) from error


_REMEDY = "use an older checkpoint, or write it again"


def _absence(directory: Path) -> tuple[str, str]:
    if not directory.exists():
        return "there is no such directory", "give the directory that holds manifest.json"
    if (directory / "config.json").is_file():
        return (
            "is a Hugging Face model, not a checkpoint",
            f"run `k2train import-hf {directory} out=DIR` first",
        )
    return (
        f"there is no {MANIFEST} in it",
        "give the directory that holds manifest.json, for example checkpoints/step-000100",
    )


def _parse(data: Mapping[str, Any]) -> Manifest:
    files = [str(shard["file"]) for shard in data["shards"]]
    if any(Path(file).name != file or not file for file in files):
        raise ValueError("a shard's file name leads out of the directory")
    held: list[list[PieceEntry]] = [[] for _ in files]
    for name, entry in data["tensors"].items():
        if not entry["pieces"]:
            raise ValueError(f"{name} has no pieces")
        for piece in entry["pieces"]:
            held[_index(piece["shard"], len(files))].append(_piece(name, entry, piece))
    shards = [
        ShardEntry(file, int(shard["bytes"]), str(shard["sha256"]), tuple(pieces))
        for file, shard, pieces in zip(files, data["shards"], held, strict=True)
    ]
    return merge(shards, dict(data["meta"]))


def _index(value: Any, count: int) -> int:
    if not 0 <= int(value) < count:
        raise IndexError(f"shard {value} of {count}")
    return int(value)


def _piece(name: str, entry: Mapping[str, Any], piece: Mapping[str, Any]) -> PieceEntry:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the unknown type {entry['dtype']}")
    shape = tuple(int(size) for size in entry["shape"])
    rows = int(piece["rows"]) if "rows" in piece else None
    return PieceEntry(
        name,
        str(entry["dtype"]),
        shape,
        str(piece.get("key", name)),
        int(piece["crc32"]),
        int(piece.get("start", 0)),
        rows,
    )


def entries_text(shards: Iterable[ShardEntry]) -> str:
    """What one writer leaves for the one that commits, as JSON."""
    return json.dumps([dataclasses.asdict(shard) for shard in shards])


def parse_entries(text: str) -> list[ShardEntry]:
    """The inverse of entries_text."""
    return [
        ShardEntry(
            shard["file"],
            shard["num_bytes"],
            shard["sha256"],
            tuple(PieceEntry(**{**piece, "shape": tuple(piece["shape"])}) for piece in shard["pieces"]),
        )
        for shard in json.loads(text)
    ]
