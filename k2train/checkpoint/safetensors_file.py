"""One safetensors file, written and read tensor by tensor.

Format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header of
{name: {dtype, shape, data_offsets}}, then the raw bytes. The library's own writer wants all tensors
of a file in memory and its reader maps the file; here a tensor is in memory only while its bytes
are written, the checksums are taken from the same bytes without a second read, and a short file is
a plain error instead of a fault in mapped memory. The tests hold both directions against the
library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# Small enough to stay in cache between the write and the two checksums.
_CHUNK_BYTES = 1 << 20
# The library refuses longer headers, so neither write nor read them.
_MAX_HEADER_BYTES = 100_000_000


class FormatError(ValueError):
    """The bytes of a file are not what a safetensors file may hold, or end too early."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is loaded when its turn comes: shape and dtype are known, `load()` makes the
    values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """What was written: size, SHA-256 of the whole file (hex), and the CRC-32 of each tensor's
    bytes by name."""

    num_bytes: int
    sha256: str
    crc32: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a file: dtype, shape, and its bytes counted from the start of the
    file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def lazy(tensor: Tensor | LazyTensor) -> LazyTensor:
    """A tensor that already exists, in the form the writer takes."""
    if isinstance(tensor, LazyTensor):
        return tensor
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_file(
    path: Path,
    tensors: Sequence[tuple[str, LazyTensor]],
    metadata: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> WrittenFile:
    """Write a new file and flush it to the disk; one tensor at a time is in memory.

    `on_bytes` is told the size of each tensor once it is written. Raises FileExistsError if `path`
    exists, OSError from the disk, ValueError for a dtype that safetensors lacks or a `load` that
    gives another shape than it promised.
    """
    # Wide types first: every tensor then starts at a multiple of its element size, which mapped
    # readers need.
    ordered = sorted(tensors, key=lambda item: -item[1].dtype.itemsize)
    digest, sums, size = hashlib.sha256(), dict[str, int](), 0
    with open(path, "xb") as file:
        head = _header_bytes(ordered, metadata or {})
        file.write(head)
        digest.update(head)
        size += len(head)
        for name, item in ordered:
            sums[name] = _write_tensor(file, digest, _checked(name, item))
            size += item.num_bytes
            if on_bytes is not None:
                on_bytes(item.num_bytes)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(size, digest.hexdigest(), sums)


def read_header(path: Path) -> dict[str, Slot]:
    """The tensors of a file by name. Raises FormatError for a damaged or short file, OSError where
    it cannot be read."""
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or length > min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise FormatError(f"its header does not fit its {file_bytes} bytes")
        header = _parse_json(file.read(length))
    slots = {name: _slot(name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    end = max((slot.offset + slot.num_bytes for slot in slots.values()), default=8 + length)
    if end != file_bytes:
        raise FormatError(f"it has {file_bytes} bytes where its header describes {end}")
    return slots


def read_tensor(path: Path, slot: Slot) -> tuple[Tensor, int]:
    """The tensor in `slot` of a file and the CRC-32 of its bytes. Raises FormatError if the file
    ends too early."""
    tensor = torch.empty(slot.shape, dtype=slot.dtype)
    return tensor, read_into(path, slot, tensor)


def read_into(path: Path, slot: Slot, out: Tensor) -> int:
    """Fill the contiguous `out` (as many bytes as `slot`) from the file; returns the CRC-32 of the
    bytes."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(slot.offset)
        for chunk in _chunks(out):
            _read_exactly(file, chunk)
            crc = zlib.crc32(chunk, crc)
    return crc


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a whole file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()


def _header_bytes(tensors: Sequence[tuple[str, LazyTensor]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, item in tensors:
        if item.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: safetensors has no type for {item.dtype}")
        if name in header:
            raise ValueError(f"{name} is given twice")
        end = offset + item.num_bytes
        header[name] = {"dtype": DTYPE_NAMES[item.dtype], "shape": item.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise ValueError(f"{len(tensors)} tensors are too many for one file: lower the shard size")
    return len(text).to_bytes(8, "little") + text


def _checked(name: str, item: LazyTensor) -> Tensor:
    tensor = item.load().detach()
    if tuple(tensor.shape) != item.shape or tensor.dtype != item.dtype:
        raise ValueError(
            f"{name} was announced as {item.dtype} {item.shape} and came as {tensor.dtype} "
            f"{tuple(tensor.shape)}"
        )
    return tensor.to("cpu").contiguous()


def _write_tensor(file: BinaryIO, digest: hashlib._Hash, tensor: Tensor) -> int:
    # A function of its own, so that no name keeps the tensor alive while the next one is loaded.
    crc = 0
    for chunk in _chunks(tensor):
        file.write(chunk)
        digest.update(chunk)
        crc = zlib.crc32(chunk, crc)
    return crc


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous CPU tensor, without a copy, a chunk at a time."""
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(view), _CHUNK_BYTES):
        yield view[start : start + _CHUNK_BYTES]


def _read_exactly(file: RawIOBase, chunk: memoryview) -> None:
    filled = 0
    while filled < len(chunk):
        count = file.readinto(chunk[filled:])
        if not count:
            raise FormatError("it ends before its last tensor")
        filled += count


def _parse_json(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise FormatError("its header is not JSON") from error
    if not isinstance(header, dict):
        raise FormatError("its header is not a JSON object")
    return header


def _slot(name: str, entry: Any, data_start: int) -> Slot:
    try:
        dtype, shape = DTYPES.get(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"its header entry for {name} is not a dtype, a shape and two offsets") from error
    if dtype is None:
        raise FormatError(f"{name} has the type {entry['dtype']}, which torch cannot hold")
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise FormatError(
            f"{name} has {end - begin} bytes for a shape of {list(shape)} and type {entry['dtype']}"
        )
    return Slot(dtype, shape, data_start + begin, end - begin)
