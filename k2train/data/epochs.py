"""One split of one dataset, read epoch after epoch through megatron-core's GPTDataset.

A GPTDataset of one epoch concatenates the split's documents in a shuffled order, cuts the stream
into windows of seq_len + 1 tokens that overlap by one (so every token is a target once), and
shuffles the windows. Each epoch is its own GPTDataset with its own seed, which keeps the order
independent of how many epochs a run needs (see order.py).

Held-out splits keep the windows in the order of the stream instead: whole documents one after
another, so that a compressor can be given the very text that a number of samples covers (its figure
suffers when windows are torn apart).

A GPTDataset's three index arrays are cached and mapped from disk, so that the processes of a node
share them. GPTDataset's own caching is not used for writing: it would write from the first rank
only, beside the corpus, and piece by piece. Here any process may build, in a directory of its own
that is then renamed; whoever comes second drops its copy. Nothing communicates; where many
processes start at once, let one of a node go first to spare the others the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from k2train.config.errors import ConfigError
from k2train.data.order import epoch_seed
from k2train.data.split import SPLITS, SplitName, as_indices
from k2train.data.tokenizer import Tokenizer

_ORDER = "order.npy"
_OPEN_EPOCHS = 2  # a batch may reach from one epoch into the next


@dataclasses.dataclass(frozen=True)
class Window:
    """How a split is cut and shuffled."""

    seq_len: int
    seed: int
    split: str
    cache_dir: Path
    tokenizer: Tokenizer


class _TokenizerFacts:
    """The three attributes that GPTDatasetConfig asks a tokenizer for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eod_id
        self.unique_identifiers = {"tokenizer": tokenizer.identity}


class EpochReader:
    """Samples 0, 1, 2, ... of one split of one dataset, without end."""

    def __init__(self, indexed: Any, documents: range, split: SplitName, window: Window) -> None:
        self._indexed = indexed
        self._documents = as_indices(documents)
        self._split = split
        self._window = window
        self._open: dict[int, tuple[Any, npt.NDArray[np.int64] | None]] = {}
        self.num_tokens = int(indexed.sequence_lengths[documents.start : documents.stop].sum(dtype=np.int64))
        self.samples_per_epoch = max(0, (self.num_tokens - 1) // window.seq_len)

    def sample(self, index: int) -> torch.Tensor:
        """Sample `index` as int64 (seq_len + 1,): the inputs and, one further, the targets."""
        epoch, within = divmod(index, self.samples_per_epoch)
        dataset, order = self._epoch(epoch)
        item = dataset[within if order is None else order[within]]
        return torch.cat([item["tokens"], item["labels"][-1:]])

    def _epoch(self, epoch: int) -> tuple[Any, npt.NDArray[np.int64] | None]:
        """The GPTDataset of an epoch, and for held-out splits where in it the windows of the stream
        are, in order."""
        if epoch not in self._open:
            while len(self._open) >= _OPEN_EPOCHS:
                self._open.pop(next(iter(self._open)))
            self._open[epoch] = self._build(epoch_seed(self._window.seed, SPLITS.index(self._split), epoch))
        return self._open[epoch]

    def _build(self, seed: int) -> tuple[Any, npt.NDArray[np.int64] | None]:
        directory = self._window.cache_dir / "indices" / self._cache_key(seed)
        try:
            if not directory.is_dir():
                self._write_indices(directory, seed)
        except OSError as error:
            raise ConfigError(
                "data.cache_dir",
                self._window.cache_dir,
                f"cannot hold shuffle indices: {error.strerror}",
                "name a directory that can be written",
            ) from error
        order = None if self._split == "train" else np.load(directory / _ORDER, mmap_mode="r")
        return self._gpt_dataset(seed, str(directory)), order

    def _write_indices(self, directory: Path, seed: int) -> None:
        # an empty path makes GPTDataset build in memory on every rank, with no file and no
        # communication
        built = self._gpt_dataset(seed, "")
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = directory.parent / f".building-{uuid.uuid4().hex}"
        scratch.mkdir()
        stem = f"{built.unique_description_hash}-{type(built).__name__}-{built.index_split.name}"
        (scratch / f"{stem}-description.txt").write_text(built.unique_description, encoding="utf-8")
        for name in ("document_index", "sample_index", "shuffle_index"):
            np.save(scratch / f"{stem}-{name}.npy", getattr(built, name))
        if self._split != "train":
            np.save(scratch / _ORDER, np.argsort(built.shuffle_index))
        try:
            os.rename(scratch, directory)
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            if not directory.is_dir():
                raise

    def _gpt_dataset(self, seed: int, path_to_cache: str) -> Any:
        from k2train.data.megatron import GPTDataset, GPTDatasetConfig, Split

        prefix = self._indexed.path_prefix
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self._window.seq_len,
            blend=([prefix], None),
            split=self._window.split,
            path_to_cache=path_to_cache,
            tokenizer=_TokenizerFacts(self._window.tokenizer),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        with _without_cache_warning():
            return GPTDataset(self._indexed, prefix, self._documents, None, Split[self._split], config)

    def _cache_key(self, seed: int) -> str:
        """The indices depend on the documents' lengths, which the index file holds, and on how they
        are cut."""
        stat = os.stat(f"{self._indexed.path_prefix}.idx")
        window = self._window
        # Another version may shuffle otherwise.
        version = importlib.metadata.version("megatron-core")
        parts = (
            version,
            os.path.abspath(self._indexed.path_prefix),
            stat.st_size,
            stat.st_mtime_ns,
            window.seq_len,
            window.split,
            window.tokenizer.identity,
            self._split,
            seed,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@contextmanager
def _without_cache_warning() -> Iterator[None]:
    """GPTDataset warns when it builds without a cache directory of its own, which is what is asked
    of it here."""
    logger = logging.getLogger("megatron.core.datasets.gpt_dataset")

    def errors_only(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    # A filter of its own for each call: training and evaluation may both be here, in two threads.
    logger.addFilter(errors_only)
    try:
        yield
    finally:
        logger.removeFilter(errors_only)
