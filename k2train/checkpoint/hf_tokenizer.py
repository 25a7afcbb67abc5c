"""The tokenizer of a run, written into an exported model directory so that transformers can
generate.

A model without its end-of-document id never stops generating. Each document of a corpus is followed
by that one token, so it is what ends a text (eos), what stood before every text in training (bos),
and what fills up a batch (pad).

A Hugging Face tokenizer's own files are copied. The byte tokenizer has no file: it is written as a
byte-level BPE without merges, whose ids are the bytes themselves. A tiktoken file is copied as it
is; transformers reads it with the code that the model's authors publish beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from k2train.checkpoint.staging import write_text
from k2train.config.convert import from_dict, to_dict
from k2train.config.data import TokenizerConfig
from k2train.data.huggingface import byte_level_alphabet
from k2train.data.tokenizer import ByteTokenizer

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
COPIED = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
END_OF_TEXT = "<|endoftext|>"
EOD_KEY = "eod_id"
TOKENIZER_KEY = "tokenizer"
"""Of a checkpoint's meta."""


def tokenizer_meta(config: TokenizerConfig, eod_id: int) -> dict[str, Any]:
    """What a checkpoint records of its run's tokenizer.

    A path is made absolute where it is a file's.
    """
    path = config.path
    if path is not None and Path(path).exists():
        path = str(Path(path).resolve())
    return {**to_dict(config), "path": path, EOD_KEY: eod_id}


def token_fields(meta: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens of config.json and generation_config.json. meta: of `tokenizer_meta`."""
    return {name: int(meta[EOD_KEY]) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def write_tokenizer(meta: Mapping[str, Any], directory: Path) -> list[str]:
    """Write the tokenizer's files into an existing directory; their names, none where they are not
    found.

    meta: of `tokenizer_meta`.
    """
    config = from_dict(
        TokenizerConfig, {key: value for key, value in meta.items() if key != EOD_KEY}, "tokenizer"
    )
    if config.kind == "byte":
        write_byte_tokenizer(directory)
        return [TOKENIZER_FILE, TOKENIZER_CONFIG_FILE]
    source = Path(config.path or "")
    if config.kind == "tiktoken":
        return _copied([source / "tiktoken.model" if source.is_dir() else source], directory)
    file = source / TOKENIZER_FILE if source.is_dir() else source
    if not file.is_file():
        return []
    shutil.copyfile(file, directory / TOKENIZER_FILE)
    copied = _copied([file.with_name(name) for name in COPIED[1:]], directory)
    if TOKENIZER_CONFIG_FILE not in copied:
        end = tokenizers.Tokenizer.from_file(str(file)).id_to_token(int(meta[EOD_KEY]))
        assert end is not None, "the run's own end-of-document id"
        _write_config(directory, end)
        copied.append(TOKENIZER_CONFIG_FILE)
    return [TOKENIZER_FILE, *copied]


def write_byte_tokenizer(directory: Path) -> None:
    """The byte tokenizer as tokenizer.json and tokenizer_config.json."""
    vocabulary = byte_level_alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    assert tokenizer.token_to_id(END_OF_TEXT) == ByteTokenizer.eod_id
    tokenizer.save(str(directory / TOKENIZER_FILE))
    _write_config(directory, END_OF_TEXT)


def _write_config(directory: Path, end: str) -> None:
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    write_text(directory / TOKENIZER_CONFIG_FILE, json.dumps(values, indent=2) + "\n")


def _copied(files: list[Path], directory: Path) -> list[str]:
    """Copy the files that are there; their names."""
    found = [file for file in files if file.is_file()]
    for file in found:
        shutil.copyfile(file, directory / file.name)
    return [file.name for file in found]
