"""What a dataset holds, for `k2train data show`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from k2train.config.convert import from_dict
from k2train.config.data import TokenizerConfig
from k2train.config.errors import ConfigError
from k2train.config.fields import check_ranges, key
from k2train.data.indexed import open_indexed
from k2train.data.sidecar import Sidecar, check_tokenizer, read_sidecar
from k2train.data.tokenizer import Tokenizer, build_tokenizer


@dataclasses.dataclass(frozen=True)
class ShowConfig:
    """Root of `k2train data show`."""

    prefix: str = key("path of the dataset without .bin and .idx")
    tokenizer: TokenizerConfig = key(
        "to decode with, the one that built the dataset", factory=TokenizerConfig
    )
    documents: int = key("documents whose beginning is shown", default=3, minimum=0)
    characters: int = key("characters shown of each", default=200, minimum=1)

    def __post_init__(self) -> None:
        check_ranges("", self)


def describe_dataset(config: ShowConfig) -> Iterator[str]:
    """Lines of text. Raises ConfigError if the dataset cannot be opened."""
    indexed = open_indexed(config.prefix, "prefix")
    sidecar = read_sidecar(config.prefix, "prefix")
    lengths = indexed.sequence_lengths
    yield f"{config.prefix}"
    yield f"  documents   {len(lengths)}"
    yield f"  tokens      {int(lengths.sum(dtype=np.int64))}, {np.dtype(indexed.index.dtype).name}"
    yield f"  lengths     {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.1f} on average"
    yield from _origin(sidecar)
    if sidecar is None or config.documents:
        yield from _first_documents(config, indexed, sidecar)


def _origin(sidecar: Sidecar | None) -> Iterator[str]:
    if sidecar is None:
        yield "  tokenizer   unknown: no side-car, so another program wrote this dataset"
        return
    yield f"  tokenizer   {sidecar.tokenizer}, vocabulary {sidecar.vocab_size}, end of document {sidecar.eod_id}"
    yield f"  text        {sidecar.num_bytes} bytes, {sidecar.num_bytes / sidecar.num_tokens:.3f} a token"
    if sidecar.num_bad_lines:
        yield f"  left out    {sidecar.num_bad_lines} malformed lines"


def _first_documents(config: ShowConfig, indexed: Any, sidecar: Sidecar | None) -> Iterator[str]:
    tokenizer = _tokenizer_of(config, sidecar)
    if tokenizer is None:
        yield "  (give tokenizer.kind and tokenizer.path to see its text)"
        return
    for document in range(min(config.documents, len(indexed))):
        yield f"  document {document}: {_beginning(tokenizer, indexed[document], config.characters)}"


def _tokenizer_of(config: ShowConfig, sidecar: Sidecar | None) -> Tokenizer | None:
    """The one that was given, else the one that the side-car names; None where that is not to be
    found.

    Raises ConfigError where the given one has not built the dataset.
    """
    tokenizer = build_tokenizer(config.tokenizer)
    if sidecar is None or sidecar.tokenizer_identity == tokenizer.identity:
        return tokenizer
    if config.tokenizer != TokenizerConfig():
        check_tokenizer(sidecar, tokenizer, config.prefix, "prefix")
    kind, _, path = sidecar.tokenizer.partition(" ")
    try:
        named = build_tokenizer(from_dict(TokenizerConfig, {"kind": kind, "path": path}, "tokenizer"))
    except (ConfigError, OSError):
        return None
    return named if named.identity == sidecar.tokenizer_identity else None


def _beginning(tokenizer: Tokenizer, ids: Any, characters: int) -> str:
    """The first characters as a Python string literal: control characters must not reach the
    terminal."""
    head = np.asarray(ids[: 8 * characters], dtype=np.int64)
    if len(head) and (int(head.max()) >= tokenizer.vocab_size or int(head.min()) < 0):
        return f"ids {head[:16].tolist()}, outside the vocabulary of tokenizer {tokenizer.name}"
    text = tokenizer.decode(head).decode(errors="replace")
    return repr(text[:characters]) + (" ..." if len(text) > characters else "")
