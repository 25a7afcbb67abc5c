"""Tokenizers: text comes back whole, bytes are counted, a document cannot end itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from k2train.config.data import TokenizerConfig, TokenizerKind
from k2train.config.errors import ConfigError
from k2train.data.tiktoken_file import KIMI_PATTERN, MAX_RUN_CHARACTERS, MAX_TEXT_CHARACTERS, cut_long
from k2train.data.tokenizer import ByteTokenizer, Tokenizer, build_tokenizer

TEXTS = [
    "plain words",
    "",
    "naïve café — 你好, мир! 👩‍👩‍👧",
    "tabs\tand\r\nline ends\n\n  spaces  ",
    "the end <|endoftext|> is not the end [EOS]",
    "I've 12345 don'T",
    "\x00\x1f\u2028\ufeff",
]
TRAINING = ["the quick brown fox jumps over the lazy dog"] * 5 + ["the words are the words", "naïve café"]


@pytest.fixture
def byte_level_file(tmp_path: Path) -> Path:
    """A byte-level BPE of a few hundred ids, trained here."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def metaspace_file(tmp_path: Path) -> Path:
    """The SentencePiece kind: spaces are a letter, unknown characters fall back to bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "</s>", *bytes_, *"▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.save(str(tmp_path / "metaspace.json"))
    return tmp_path / "metaspace.json"


@pytest.fixture
def ranks_file(tmp_path: Path) -> Path:
    """All bytes and a few merges in tiktoken's form."""
    pieces = [bytes([byte]) for byte in range(256)] + [
        b"th",
        b"the",
        b" the",
        b" w",
        b"or",
        "é".encode(),
        b"  ",
    ]
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    return tmp_path / "tiktoken.model"


@pytest.fixture(params=["byte", "byte_level", "metaspace", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest) -> Iterator[Tokenizer]:
    if request.param == "byte":
        yield ByteTokenizer()
        return
    kind: TokenizerKind = "tiktoken" if request.param == "tiktoken" else "huggingface"
    file = request.getfixturevalue({"tiktoken": "ranks_file"}.get(request.param, f"{request.param}_file"))
    yield build_tokenizer(TokenizerConfig(kind, str(file)))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_byte_for_byte(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.num_bytes(ids) == len(text.encode())
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.eod_id not in ids


def test_the_end_of_document_stands_for_no_bytes(tokenizer: Tokenizer) -> None:
    ids = np.concatenate(
        [tokenizer.encode("one"), [tokenizer.eod_id], tokenizer.encode("two"), [tokenizer.eod_id]]
    )
    assert tokenizer.decode(ids) == b"onetwo"
    assert tokenizer.num_bytes(ids) == 6
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size


def test_half_a_surrogate_pair_is_an_error_and_no_replacement(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("broken \ud800 text")


@given(st.text())
@settings(deadline=None)
def test_bytes_round_trip_for_every_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).decode() == text
    assert len(ids) == tokenizer.num_bytes(ids) == len(text.encode())


@given(st.lists(st.integers(0, 256)))
@settings(deadline=None)
def test_bytes_are_counted_for_any_ids(ids: list[int]) -> None:
    assert ByteTokenizer().num_bytes(np.array(ids)) == sum(token < 256 for token in ids)


def test_half_a_character_at_the_edge_of_a_sample_keeps_its_own_bytes(
    byte_level_file: Path, ranks_file: Path
) -> None:
    for config in (
        TokenizerConfig("huggingface", str(byte_level_file)),
        TokenizerConfig("tiktoken", str(ranks_file)),
    ):
        tokenizer = build_tokenizer(config)
        ids = tokenizer.encode("你")
        assert b"".join(tokenizer.decode(ids[i : i + 1]) for i in range(len(ids))) == "你".encode()
        assert sum(tokenizer.num_bytes(ids[i : i + 1]) for i in range(len(ids))) == 3


def test_ids_are_those_of_the_tokenizers_library(byte_level_file: Path) -> None:
    ours = build_tokenizer(TokenizerConfig("huggingface", str(byte_level_file.parent)))
    library = tokenizers.Tokenizer.from_file(str(byte_level_file))
    for text in TRAINING:
        assert ours.encode(text).tolist() == library.encode(text).ids
    assert ours.vocab_size == library.get_vocab_size()


def test_merges_of_a_rank_file_are_applied(ranks_file: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig("tiktoken", str(ranks_file)))
    assert tokenizer.encode("the the").tolist() == [257, 258]
    assert tokenizer.vocab_size == 263 + 256
    assert tokenizer.eod_id == 263 + 1


def test_a_pattern_of_ones_own_cuts_words_otherwise(ranks_file: Path) -> None:
    """Letter by letter, so that no merge can happen."""
    plain = build_tokenizer(TokenizerConfig("tiktoken", str(ranks_file)))
    letters = build_tokenizer(TokenizerConfig("tiktoken", str(ranks_file), pattern=r"."))
    assert letters.encode("the").tolist() == [*b"the"]
    assert letters.identity != plain.identity


def test_the_pattern_cuts_as_kimis_does(ranks_file: Path) -> None:
    """Han characters alone, three digits at most, contractions with their word, spaces with what
    follows."""
    import regex

    pattern = regex.compile(KIMI_PATTERN, flags=regex.VERSION1)
    text = "Hello world你好 I've 12345 HTTPServer  \n x"
    assert pattern.findall(text) == [
        "Hello",
        " world",
        "你好",
        " I've",
        " ",
        "123",
        "45",
        " HTTPServer",
        "  \n",
        " x",
    ]


def test_eos_is_the_one_that_tokenizer_config_names(byte_level_file: Path, ranks_file: Path) -> None:
    config = byte_level_file.with_name("tokenizer_config.json")
    config.write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert build_tokenizer(TokenizerConfig("huggingface", str(byte_level_file))).decode(np.array([0])) != b""
    added = {"263": {"content": "[BOS]"}, "270": {"content": "[DONE]"}}
    config.write_text(json.dumps({"eos_token": "[DONE]", "added_tokens_decoder": added}))
    assert build_tokenizer(TokenizerConfig("tiktoken", str(ranks_file))).eod_id == 270
    config.write_text("{}")
    with pytest.raises(ConfigError, match="eos_token"):
        build_tokenizer(TokenizerConfig("tiktoken", str(ranks_file)))


@given(st.integers(0, 3), st.integers(0, 3), st.text(alphabet=" a\n", max_size=20))
@settings(deadline=None)
def test_long_text_is_cut_without_loss(words: int, spaces: int, rest: str) -> None:
    text = "w" * (words * MAX_RUN_CHARACTERS + words) + " " * (spaces * MAX_RUN_CHARACTERS + 1) + rest
    pieces = list(cut_long(text))
    assert "".join(pieces) == text
    assert all(len(piece) <= MAX_TEXT_CHARACTERS for piece in pieces)
    assert all("w" * (MAX_RUN_CHARACTERS + 1) not in piece for piece in pieces)
    assert all(" " * (MAX_RUN_CHARACTERS + 1) not in piece for piece in pieces)


def test_a_megabyte_without_a_space_is_encoded(ranks_file: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig("tiktoken", str(ranks_file)))
    text = "x" * 1_000_000
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize(
    ("kind", "content", "rule"),
    [
        ("huggingface", "{}", "is not a tokenizer"),
        ("huggingface", None, "not found"),
        ("tiktoken", "AA== x\n", "rank file"),
        ("tiktoken", "AA== 0\nAQ== 5\n", "ranks 0, 1, 2"),
        ("tiktoken", None, "neither a file nor an encoding"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(
    tmp_path: Path, kind: str, content: str | None, rule: str
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=rule) as caught:
        build_tokenizer(TokenizerConfig(kind, str(file)))  # type: ignore[arg-type]
    assert caught.value.field == "tokenizer.path"


def test_a_tokenizer_without_an_end_of_document_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match="has no end-of-document token"):
        build_tokenizer(TokenizerConfig("huggingface", str(tmp_path / "t.json")))
