"""Opens a dataset in megatron-core's indexed format, after checking that its files are what they
say.

megatron-core itself checks with `assert` and maps the files unread, so a truncated .bin would show
as a wrong read in the middle of a run. The header is small and public: magic, version, type code,
counts, then lengths and byte offsets.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from k2train.config.errors import ConfigError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34
# type code -> bytes of an id; the format also knows floating types, which are no token ids
_ID_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
_REBUILD = "copy the dataset again from its source, or build it again with `k2train data build`"


def open_indexed(prefix: str, field: str) -> Any:
    """megatron-core's IndexedDataset of `prefix`; ConfigError (under `field`) if its files are
    missing or damaged."""
    check_files(prefix, field)
    from k2train.data.megatron import IndexedDataset

    return IndexedDataset(prefix)


def check_files(prefix: str, field: str) -> None:
    """Raise ConfigError unless PREFIX.idx and PREFIX.bin exist, are well formed and agree about
    their sizes."""
    _check_exist(prefix, field)
    index = Path(f"{prefix}.idx")
    code, num_sequences, num_documents = _read_header(index, field)
    lengths_and_offsets = 12 * num_sequences
    expected = _HEADER_BYTES + lengths_and_offsets + 8 * num_documents
    if index.stat().st_size < expected:
        raise ConfigError(field, index, f"is cut short: {index.stat().st_size} bytes of {expected}", _REBUILD)
    if num_sequences == 0:
        raise ConfigError(field, prefix, "holds no documents", _REBUILD)
    _check_data_size(prefix, field, _ID_BYTES[code], num_sequences)


def _check_exist(prefix: str, field: str) -> None:
    missing = [suffix for suffix in (".idx", ".bin") if not Path(prefix + suffix).is_file()]
    if not missing:
        return
    stem, _, suffix = prefix.rpartition(".")
    if suffix in ("bin", "idx", "json") and Path(f"{stem}.idx").is_file():
        raise ConfigError(field, prefix, "names a file of the dataset, not its prefix", f"write {stem}")
    files = " and ".join(prefix + suffix for suffix in missing)
    parent = Path(prefix).parent
    near = sorted(str(path.with_suffix("")) for path in parent.glob("*.idx")) if parent.is_dir() else []
    hint = (
        f"datasets in that directory: {', '.join(near[:5])}" if near else "build it with `k2train data build`"
    )
    raise ConfigError(field, prefix, f"{files} not found", hint)


def _read_header(index: Path, field: str) -> tuple[int, int, int]:
    """(type code, sequences, entries of the document table) of an index file."""
    try:
        with open(index, "rb") as stream:
            head = stream.read(_HEADER_BYTES)
    except OSError as error:
        raise ConfigError(field, index, f"cannot be read: {error.strerror}") from error
    if len(head) < _HEADER_BYTES or head[:9] != _MAGIC:
        raise ConfigError(field, index, "is not an index of megatron-core's format", _REBUILD)
    version, code, num_sequences, num_documents = struct.unpack("<QBQQ", head[9:])
    if version != 1 or code not in _ID_BYTES:
        raise ConfigError(
            field, index, f"has version {version} and type code {code}; version 1 with integer ids is read"
        )
    return code, num_sequences, num_documents


def _check_data_size(prefix: str, field: str, id_bytes: int, num_sequences: int) -> None:
    """The last sequence must end inside the .bin; lengths and offsets are read from the index
    without loading it all."""
    index = np.memmap(f"{prefix}.idx", mode="r")
    last = _HEADER_BYTES + 4 * (num_sequences - 1)
    length = int(np.frombuffer(index[last : last + 4].tobytes(), dtype=np.int32)[0])
    last = _HEADER_BYTES + 4 * num_sequences + 8 * (num_sequences - 1)
    offset = int(np.frombuffer(index[last : last + 8].tobytes(), dtype=np.int64)[0])
    size = Path(f"{prefix}.bin").stat().st_size
    expected = offset + length * id_bytes
    if size < expected:
        raise ConfigError(
            field, f"{prefix}.bin", f"is cut short: {size} bytes, the index describes {expected}", _REBUILD
        )
    if size == 0:
        raise ConfigError(field, f"{prefix}.bin", "holds no tokens", _REBUILD)
