"""Small datasets for the tests of this room."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from k2train.data.tokenizer import ByteTokenizer
from k2train.data.writer import DatasetWriter

WriteDataset = Callable[[str, Sequence[str]], str]


def numbered_documents(count: int, label: str = "d", words: int = 40) -> list[str]:
    """Documents in which every word names its document, of uneven length."""
    return [f"{label}{i} " * (1 + (i * 7) % words) for i in range(count)]


@pytest.fixture
def write_dataset(tmp_path: Path) -> WriteDataset:
    """Write byte-level documents under tmp_path/<name>; returns the prefix."""

    def write(name: str, documents: Sequence[str]) -> str:
        tokenizer = ByteTokenizer()
        writer = DatasetWriter(tmp_path / name, tokenizer)
        for text in documents:
            writer.add(tokenizer.encode(text), len(text.encode()))
        writer.finish()
        return str(tmp_path / name)

    return write


@pytest.fixture
def foreign_dataset(tmp_path: Path) -> str:
    """What another program writes with megatron-core alone: 32-bit ids, no side-car."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path / "foreign")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    for i in range(60):
        ids = [65 + (i + k) % 26 for k in range(5 + i % 11)] + [256]
        builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    return prefix
