"""Writes one indexed dataset so that it either exists whole or not at all.

Everything is written under a temporary name beside the target and renamed when complete. Three
renames are not one, so the index goes last and an old index is removed first: without an .idx there
is no dataset, and at no moment does an index stand beside data that it does not describe.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from k2train.data.sidecar import FORMAT, Sidecar, write_sidecar
from k2train.data.tokenizer import Ids, Tokenizer


class DatasetWriter:
    """Appends documents to PREFIX.bin through megatron-core's builder and counts them."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        from k2train.data.megatron import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self._tokenizer = tokenizer
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self._builder: Any = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self.dtype)
        self.num_documents = 0
        self.num_tokens = 0
        self.num_bytes = 0

    def add(self, ids: Ids, num_bytes: int) -> None:
        """Append one document of `num_bytes` bytes of text; the end-of-document id is added
        here."""
        document = np.empty(len(ids) + 1, dtype=self.dtype)
        document[:-1] = ids
        document[-1] = self._tokenizer.eod_id
        self._builder.add_document(document, [len(document)])
        self.num_documents += 1
        self.num_tokens += len(document)
        self.num_bytes += num_bytes

    def add_many(self, ids: Ids, lengths: Sequence[int], num_bytes: int) -> None:
        """Append documents that already end in the end-of-document id, laid end to end in `ids`."""
        start = 0
        for length in lengths:
            self._builder.add_document(ids[start : start + length], [length])
            start += length
        self.num_documents += len(lengths)
        self.num_tokens += start
        self.num_bytes += num_bytes

    def finish(self, num_bad_lines: int = 0) -> Sidecar:
        """Write the index and the side-car."""
        self._builder.finalize(f"{self.prefix}.idx")
        sidecar = Sidecar(
            format=FORMAT,
            tokenizer=self._tokenizer.name,
            tokenizer_identity=self._tokenizer.identity,
            vocab_size=self._tokenizer.vocab_size,
            eod_id=self._tokenizer.eod_id,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
            num_bad_lines=num_bad_lines,
        )
        write_sidecar(Path(f"{self.prefix}.json"), sidecar)
        return sidecar

    def close(self) -> None:
        """Let go of the data file; finish has done so already, an interrupted build has not."""
        self._builder.data_file.close()


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A directory on the target's file system that is gone afterwards, whatever happened. Yields a
    prefix inside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
    try:
        yield directory / target.name
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(staged: Path, target: Path, extra: tuple[str, ...] = (), same: bool = False) -> None:
    """Rename the staged dataset to its place, the index last. `extra` are further suffixes, absent
    ones are removed.

    same: whatever is there already holds the same bytes, so its index stays and another process may
        open it meanwhile.
    """
    if not same:
        Path(f"{target}.idx").unlink(missing_ok=True)
    for suffix in (".bin", ".json", *extra):
        source, destination = Path(f"{staged}{suffix}"), Path(f"{target}{suffix}")
        if source.exists():
            os.replace(source, destination)
        else:
            destination.unlink(missing_ok=True)
    os.replace(f"{staged}.idx", f"{target}.idx")
