"""tiktoken: a file of ranks such as Kimi K2's `tiktoken.model`, or one of the library's own
encodings by name.

A rank file holds the byte strings and their ranks and nothing else. What else Kimi's released
tokenizer fixes is fixed here too: the pattern that cuts text into words, 256 ids after the ranks
for special tokens, and the places where very long text is cut before it reaches the library (which
fails on words of some 100 thousand characters).
Source: the tokenizer files released with Kimi-K2-Base.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from k2train.config.errors import ConfigError, nearest
from k2train.data.tokenizer import Ids

_FIELD = "tokenizer.path"
NUM_SPECIAL = 256
MAX_TEXT_CHARACTERS = 400_000
MAX_RUN_CHARACTERS = 25_000

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class TiktokenTokenizer:
    """Text is never scanned for special tokens, so a document that quotes one cannot end itself."""

    def __init__(self, path: str, pattern: str | None = None) -> None:
        file = Path(path) / "tiktoken.model" if Path(path).is_dir() else Path(path)
        if file.is_file():
            self._encoding, self.eod_id = _from_ranks(file, pattern)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
            self.identity = (
                f"tiktoken {digest} pattern {_short_hash(pattern or KIMI_PATTERN)} eod {self.eod_id}"
            )
        else:
            self._encoding, self.eod_id = _by_name(path)
            self.identity = f"tiktoken {path}"
        self.name = f"tiktoken {file if file.is_file() else path}"
        self.vocab_size = self._encoding.n_vocab
        self._bytes_of = _bytes_table(self._encoding)
        self._lengths = np.array([len(piece) for piece in self._bytes_of], dtype=np.int64)
        self._lengths[self.eod_id] = 0

    def encode(self, text: str) -> Ids:
        text.encode()  # the library would replace lone surrogates silently
        pieces = (self._encoding.encode_ordinary(piece) for piece in cut_long(text))
        return np.fromiter(itertools.chain.from_iterable(pieces), dtype=np.int64)

    def decode(self, ids: Ids) -> bytes:
        return b"".join(self._bytes_of[int(token)] for token in np.asarray(ids) if token != self.eod_id)

    def num_bytes(self, ids: Ids) -> int:
        return int(self._lengths[np.asarray(ids)].sum())


def cut_long(text: str) -> Iterator[str]:
    """Pieces of at most MAX_TEXT_CHARACTERS, in each of which no run of spaces or of non-spaces
    exceeds MAX_RUN_CHARACTERS. Joined they are `text`."""
    for start in range(0, len(text), MAX_TEXT_CHARACTERS):
        yield from _cut_runs(text[start : start + MAX_TEXT_CHARACTERS], MAX_RUN_CHARACTERS)


def _cut_runs(text: str, limit: int) -> Iterator[str]:
    start = place = 0
    for _, run in itertools.groupby(text, key=str.isspace):
        length = sum(1 for _ in run)
        for cut in range(place + limit, place + length, limit):
            yield text[start:cut]
            start = cut
        place += length
    yield text[start:]


def _from_ranks(file: Path, pattern: str | None) -> tuple[tiktoken.Encoding, int]:
    try:
        ranks = load_tiktoken_bpe(str(file))
    except Exception as error:  # bad base64, a line without a rank, no UTF-8: each its own type
        raise ConfigError(
            _FIELD, file, f"is not a tiktoken rank file: {error}", "each line is BASE64 RANK"
        ) from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ConfigError(_FIELD, file, "must hold the ranks 0, 1, 2, ... once each")
    special = _special_tokens(file.with_name("tokenizer_config.json"), len(ranks))
    try:
        encoding = tiktoken.Encoding(
            file.name, pat_str=pattern or KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
    except ValueError as error:
        raise ConfigError(
            "tokenizer.pattern", pattern, f"is not a pattern of the tiktoken library: {error}"
        ) from error
    return encoding, special["[EOS]"]


def _special_tokens(config_file: Path, first: int) -> dict[str, int]:
    """Names for the NUM_SPECIAL ids after the ranks. [EOS] is the one that tokenizer_config.json
    beside the ranks names as eos_token, else the second, as in Kimi's."""
    eos_id = first + 1
    if config_file.is_file():
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            names = {entry["content"]: int(token) for token, entry in config["added_tokens_decoder"].items()}
            eos_id = names[config["eos_token"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                _FIELD, config_file, f"does not name an eos_token with its id: {error!r}"
            ) from error
    if not first <= eos_id < first + NUM_SPECIAL:
        raise ConfigError(
            _FIELD, config_file, f"puts eos_token at id {eos_id}, outside the {NUM_SPECIAL} after the ranks"
        )
    tokens = {f"<|reserved_token_{token}|>": token for token in range(first, first + NUM_SPECIAL)}
    del tokens[f"<|reserved_token_{eos_id}|>"]
    return {**tokens, "[EOS]": eos_id}


def _by_name(name: str) -> tuple[tiktoken.Encoding, int]:
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ConfigError(
            _FIELD, name, "is neither a file nor an encoding of the tiktoken library", nearest(name, known)
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # whatever the library's HTTP client raises
        raise ConfigError(
            _FIELD,
            name,
            f"is not in tiktoken's cache and cannot be fetched: {type(error).__name__}",
            "set TIKTOKEN_CACHE_DIR to a directory that holds it, or give a rank file",
        ) from error
    return encoding, encoding.eot_token


def _bytes_table(encoding: tiktoken.Encoding) -> list[bytes]:
    table = [b""] * encoding.n_vocab
    for token in range(encoding.n_vocab):
        try:
            table[token] = encoding.decode_single_token_bytes(token)
        except KeyError:
            continue  # an id without a token
    return table


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
