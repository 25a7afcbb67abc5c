"""A Hugging Face `tokenizer.json`, through the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from k2train.config.errors import ConfigError
from k2train.data.tokenizer import Ids

_FIELD = "tokenizer.path"
_END_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "[EOS]",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[SEP]",
)


class HuggingFaceTokenizer:
    """Text is never scanned for special tokens, so a document that quotes one cannot end itself."""

    def __init__(self, path: str) -> None:
        file = _tokenizer_file(path)
        self._tokenizer = _load(file)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = _end_of_document(file, vocabulary)
        self.name = f"huggingface {file}"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
        self.identity = f"huggingface {digest} eod {self.eod_id}"
        self._bytes_of = _byte_level_table(self._tokenizer, vocabulary, self.vocab_size)

    def encode(self, text: str) -> Ids:
        text.encode()  # the library would panic on lone surrogates
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Ids) -> bytes:
        kept = [int(token) for token in np.asarray(ids) if token != self.eod_id]
        if self._bytes_of is not None:
            return b"".join(self._bytes_of[token] for token in kept)
        return self._tokenizer.decode(kept, skip_special_tokens=False).encode()

    def num_bytes(self, ids: Ids) -> int:
        return len(self.decode(ids))


def _tokenizer_file(path: str) -> Path:
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            _FIELD, path, f"{file} not found", "give a tokenizer.json or a directory that holds one"
        )
    return file


def _load(file: Path) -> Any:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            _FIELD, file, f"is not a tokenizer of the tokenizers library: {error}", "check the file"
        ) from error


def _end_of_document(file: Path, vocabulary: dict[str, int]) -> int:
    """The id of `eos_token` in tokenizer_config.json beside the file, else of the first well-known
    name."""
    named = _configured_eos(file.with_name("tokenizer_config.json"))
    if named is not None and named in vocabulary:
        return vocabulary[named]
    for name in _END_OF_DOCUMENT:
        if name in vocabulary:
            return vocabulary[name]
    raise ConfigError(
        _FIELD,
        file,
        "has no end-of-document token",
        "name it as eos_token in tokenizer_config.json beside it, or add one of "
        + " ".join(_END_OF_DOCUMENT),
    )


def _configured_eos(config_file: Path) -> str | None:
    if not config_file.is_file():
        return None
    try:
        eos = json.loads(config_file.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(_FIELD, config_file, f"cannot be read: {error}") from error
    return eos.get("content") if isinstance(eos, dict) else eos


def _byte_level_table(tokenizer: Any, vocabulary: dict[str, int], vocab_size: int) -> list[bytes] | None:
    """The bytes of every id of a byte-level tokenizer; None for other kinds, whose ids have no
    bytes of their own.

    With it, half a character at the edge of a sample decodes to its own bytes rather than to a
    replacement sign.
    """
    if not isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel):
        return None
    byte_of = byte_level_alphabet()
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    table = [b""] * vocab_size
    for text, token in vocabulary.items():
        spelled = all(character in byte_of for character in text) and text not in added
        table[token] = bytes(byte_of[character] for character in text) if spelled else text.encode()
    return table


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others are numbered from
    U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet
