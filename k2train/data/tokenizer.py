"""What a tokenizer is here, and the byte-level one.

A tokenizer turns a document's text into ids and back and can say how many bytes of text a run of
ids stands for; that is all that building a corpus and reporting bits per byte need. The
end-of-document id is put after every document by the builder, never by `encode`, and stands for no
bytes.

The byte tokenizer is 256 byte values and the end-of-document id 256, so it needs no file, knows
every text, and its loss divided by ln 2 is bits per byte. The other kinds live in `huggingface.py`
and `tiktoken_file.py`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from k2train.config.data import TokenizerConfig

Ids = npt.NDArray[np.integer]


class Tokenizer(Protocol):
    """Text to ids and back.

    name: for reports, with the file it came from.
    identity: equal for two tokenizers exactly when they map text to ids alike; written beside a
        corpus.
    vocab_size: ids are 0 .. vocab_size - 1, special tokens included.
    eod_id: the end-of-document id.
    """

    name: str
    identity: str
    vocab_size: int
    eod_id: int

    def encode(self, text: str) -> Ids:
        """Ids of `text`, special tokens neither added nor recognised. Raises UnicodeEncodeError on
        lone surrogates."""
        ...

    def decode(self, ids: Ids) -> bytes:
        """The UTF-8 bytes that `ids` stand for; end-of-document ids stand for none."""
        ...

    def num_bytes(self, ids: Ids) -> int:
        """len(decode(ids)), without building it where the tokenizer allows that."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a document."""

    name = "byte"
    identity = "byte"
    vocab_size = 257
    eod_id = 256

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Ids) -> bytes:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def num_bytes(self, ids: Ids) -> int:
        return int(np.count_nonzero(np.asarray(ids) < 256))


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a config. Raises ConfigError where its file cannot be read or has no
    end-of-document token."""
    if config.kind == "byte":
        return ByteTokenizer()
    assert config.path is not None  # TokenizerConfig checks it
    # imported here because each pulls in a library that the byte-level default does not need
    if config.kind == "huggingface":
        from k2train.data.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(config.path)
    from k2train.data.tiktoken_file import TiktokenTokenizer

    return TiktokenTokenizer(config.path, config.pattern)
