"""What a run reads: a blend of indexed datasets, split by documents, in an order fixed by seed and
position.

Step s of a run with n sequences a step takes samples s * n .. (s + 1) * n of the training split,
and each rank takes
its own part of those: nothing about ranks, microbatches or restarts enters here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from k2train.config.data import DataConfig, TokenizerConfig
from k2train.config.errors import ConfigError
from k2train.data.epochs import EpochReader, Window
from k2train.data.indexed import open_indexed
from k2train.data.order import Blend
from k2train.data.sidecar import check_tokenizer, read_sidecar
from k2train.data.split import SPLITS, SplitName, document_ranges, parse_split
from k2train.data.stdlib import build_stdlib
from k2train.data.tokenizer import Tokenizer, build_tokenizer

EVALUATION_SEED = 0
"""Held-out documents come in one order whatever the run's seed, so that runs with different seeds
are comparable."""

HELD_OUT_SPLIT, HELD_OUT_SHARES = "0,1,0", (0.0, 1.0, 0.0)
"""Of a corpus that is held out as a whole, as megatron-core and as `split` write it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One dataset of the blend, opened."""

    prefix: str
    field: str
    weight: float
    num_documents: dict[SplitName, int]
    readers: dict[SplitName, EpochReader]


class Corpus:
    """Samples of the three splits. Made by `build_corpus`."""

    def __init__(
        self,
        sources: dict[SplitName, list[Source]],
        tokenizer: Tokenizer,
        seq_len: int,
        vocab_size: int,
        identity: str,
    ) -> None:
        """sources: of every split; held-out text may come from corpora of its own."""
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.identity = identity
        self._sources = sources
        self._vocab_size = vocab_size
        self._blends = {split: Blend([source.weight for source in of]) for split, of in sources.items()}

    def batch(self, split: SplitName, start: int, count: int) -> torch.Tensor:
        """Samples start .. start + count of a split as int64 (count, seq_len + 1): x[:, :-1] are
        inputs, x[:, 1:]
        their targets. Without end: the documents are shuffled again for each epoch.

        Raises ConfigError if the split holds no whole sample or a token id does not fit the
        vocabulary.
        """
        self._check_not_empty(split)
        corpora, samples = self._blends[split].locate(start, count)
        rows = [self._row(int(c), split, int(i)) for c, i in zip(corpora, samples, strict=True)]
        return torch.stack(rows) if rows else torch.empty((0, self.seq_len + 1), dtype=torch.int64)

    def num_samples(self, split: SplitName) -> int:
        """Samples of a split before any corpus repeats; 0 if some corpus has none."""
        counts = [source.readers[split].samples_per_epoch for source in self._sources[split]]
        return self._blends[split].first_beyond(counts) if min(counts) else 0

    def num_tokens(self, split: SplitName) -> int:
        """Tokens of a split over all corpora, end-of-document tokens included."""
        return sum(source.readers[split].num_tokens for source in self._sources[split])

    def num_documents(self, split: SplitName) -> int:
        """Documents of a split over all corpora."""
        return sum(source.num_documents[split] for source in self._sources[split])

    def num_bytes(self, tokens: torch.Tensor) -> int:
        """Bytes of text that `tokens` (any shape) stand for; end-of-document tokens stand for none.

        Held-out bits per byte = summed loss of the targets in nats / ln 2 / num_bytes(targets).
        """
        return self.tokenizer.num_bytes(tokens.reshape(-1).cpu().numpy())

    def held_out_streams(self, num_samples: int, split: SplitName = "valid") -> list[torch.Tensor]:
        """The tokens of batch(split, 0, num_samples) as one stream a corpus, at most one pass:
        int64 (n * seq_len + 1,) of the n samples that are that corpus's, nothing for a corpus
        without any.

        For the held-out splits, whose windows stand in the order of the text.
        """
        corpora, _ = self._blends[split].locate(0, min(num_samples, self.num_samples(split)))
        streams = []
        for corpus in range(len(self._sources[split])):
            rows = [
                self._row(corpus, split, index) for index in range(int(np.count_nonzero(corpora == corpus)))
            ]
            if rows:
                streams.append(torch.cat([rows[0][:1], *(row[1:] for row in rows)]))
        return streams

    def held_out_text(self, num_samples: int, split: SplitName = "valid") -> bytes:
        """The text of the targets of batch(split, 0, num_samples), corpus after corpus, at most one
        pass.

        It is what a compressor must be given to be compared with the loss over those samples.
        """
        streams = self.held_out_streams(num_samples, split)
        return b"".join(self.tokenizer.decode(stream[1:].numpy()) for stream in streams)

    def _row(self, corpus: int, split: SplitName, index: int) -> torch.Tensor:
        source = self._sources[split][corpus]
        row = source.readers[split].sample(index)
        largest, smallest = int(row.max()), int(row.min())
        if largest >= self._vocab_size or smallest < 0:
            wrong = largest if largest >= self._vocab_size else smallest
            raise ConfigError(
                source.field,
                source.prefix,
                f"holds token id {wrong}, the vocabulary has ids 0 to {self._vocab_size - 1}",
                "use the tokenizer and model.vocab_size that the dataset was built for",
            )
        return row

    def _check_not_empty(self, split: SplitName) -> None:
        for source in self._sources[split]:
            reader = source.readers[split]
            if reader.samples_per_epoch == 0:
                raise _too_small(source, split, reader.num_tokens, self.seq_len)


def build_corpus(config: DataConfig, seq_len: int, seed: int, vocab_size: int | None = None) -> Corpus:
    """Open the corpora of `config`, building the default one if none is named.

    vocab_size: the model's; None takes the tokenizer's. How many samples a run will read is no
    argument: samples go on without end, and their order does not depend on it.
    Communicates with nobody: every rank may call it, at any time.
    Raises ConfigError for whatever the user got wrong about `data`.
    """
    config.check_corpus()
    tokenizer = check_vocabulary(config.tokenizer, vocab_size)
    parse_split(config.split)
    named = [(entry.prefix, f"data.blend[{i}].prefix", entry.weight) for i, entry in enumerate(config.blend)]
    if not named:
        named = [(str(build_stdlib(Path(config.cache_dir), tokenizer)), "data.blend", 1.0)]
    sources = [_open_source(config, tokenizer, entry, seq_len, seed) for entry in named]
    held_out = _open_held_out(config, tokenizer, seq_len)
    _check_samples(config, sources, seq_len, bool(held_out))
    identity = _identity(config, tokenizer, sources, seq_len, seed)
    of_split: dict[SplitName, list[Source]] = {
        "train": sources,
        "valid": held_out or sources,
        "test": sources,
    }
    return Corpus(of_split, tokenizer, seq_len, vocab_size or tokenizer.vocab_size, identity)


def check_vocabulary(config: TokenizerConfig, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of `data.tokenizer`.

    Raises ConfigError where it cannot be read or has ids that the model has not.
    vocab_size: the model's; None for any.
    """
    try:
        tokenizer = build_tokenizer(config)
    except ConfigError as error:
        raise error.placed("data.tokenizer") from error
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        rule = f"is smaller than the {tokenizer.vocab_size} ids of the tokenizer {tokenizer.name}"
        remedy = f"set model.vocab_size={tokenizer.vocab_size} or more"
        raise ConfigError("model.vocab_size", vocab_size, rule, remedy)
    return tokenizer


def _open_source(
    config: DataConfig,
    tokenizer: Tokenizer,
    entry: tuple[str, str, float],
    seq_len: int,
    seed: int,
    shares: tuple[float, float, float] | None = None,
) -> Source:
    """shares: of the splits; None takes those of data.split."""
    prefix, field, weight = entry
    indexed = open_indexed(prefix, field)
    sidecar = read_sidecar(prefix, field)
    if sidecar is not None:
        check_tokenizer(sidecar, tokenizer, prefix, field)
    ranges = document_ranges(shares or parse_split(config.split), len(indexed))
    readers = {}
    for split in SPLITS:
        window = Window(
            seq_len,
            seed if split == "train" else EVALUATION_SEED,
            config.split,
            Path(config.cache_dir),
            tokenizer,
        )
        readers[split] = EpochReader(indexed, ranges[split], split, window)
    return Source(prefix, field, weight, {split: len(ranges[split]) for split in SPLITS}, readers)


def _open_held_out(config: DataConfig, tokenizer: Tokenizer, seq_len: int) -> list[Source]:
    """The corpora of `data.valid`, all of whose documents are held out.

    Raises ConfigError for one without a sample.
    """
    whole = dataclasses.replace(config, split=HELD_OUT_SPLIT)
    named = [(entry.prefix, f"data.valid[{i}].prefix", entry.weight) for i, entry in enumerate(config.valid)]
    sources = [
        _open_source(whole, tokenizer, entry, seq_len, EVALUATION_SEED, HELD_OUT_SHARES) for entry in named
    ]
    for source in sources:
        if source.readers["valid"].samples_per_epoch == 0:
            raise _too_small(source, "valid", source.readers["valid"].num_tokens, seq_len)
    return sources


def _check_samples(config: DataConfig, sources: list[Source], seq_len: int, own_held_out: bool) -> None:
    """Training and, where a share was asked for, validation must hold a sample of every corpus:
    otherwise a run would find out at its first evaluation, or worse, report none."""
    validates = parse_split(config.split)[1] > 0 and not own_held_out
    for source in sources:
        for split in SPLITS[: 1 + validates]:
            if source.readers[split].samples_per_epoch == 0:
                raise _too_small(source, split, source.readers[split].num_tokens, seq_len)


def _too_small(source: Source, split: SplitName, num_tokens: int, seq_len: int) -> ConfigError:
    return ConfigError(
        source.field,
        source.prefix,
        f"its {split} documents hold {num_tokens} tokens, less than one sample of {seq_len + 1}",
        "give that split a larger share in data.split ('1,0,0' holds nothing out), add text, or "
        "lower train.seq_len",
    )


def _identity(
    config: DataConfig, tokenizer: Tokenizer, sources: list[Source], seq_len: int, seed: int
) -> str:
    """Equal for two corpora that give the same samples; a run can refuse to be resumed on other
    data."""
    digest = hashlib.sha256()
    for source in sources:
        for suffix in (".idx", ".bin"):
            # the beginnings and the sizes tell corpora apart; reading terabytes at every start
            # would not be worth more
            with open(source.prefix + suffix, "rb") as stream:
                digest.update(stream.read(1 << 20))
            digest.update(repr((os.path.getsize(source.prefix + suffix), source.weight)).encode())
    digest.update(repr((config.split, tokenizer.identity, seq_len, seed)).encode())
    return digest.hexdigest()[:32]
