"""`data`: the corpora a run reads, and the separate root config of `k2train data build`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from k2train.config.errors import ConfigError
from k2train.config.fields import check_ranges, key

TokenizerKind = Literal["byte", "huggingface", "tiktoken"]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """`data.tokenizer`: how text becomes token ids."""

    kind: TokenizerKind = key(
        "byte (256 bytes and an end-of-document token), huggingface or tiktoken", default="byte"
    )
    path: str | None = key(
        "tokenizer.json, a directory that holds one, or a tiktoken file or encoding name", default=None
    )
    pattern: str | None = key(
        "tiktoken files: regular expression that cuts text into words; null takes Kimi K2's", default=None
    )

    def __post_init__(self) -> None:
        if self.kind != "byte" and not self.path:
            rule = f"a {self.kind} tokenizer needs its file"
            raise ConfigError(
                "tokenizer.path", self.path, rule, "set tokenizer.path=FILE, or tokenizer.kind=byte"
            )


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """One entry of `data.blend`: an indexed dataset and its share of the training tokens."""

    prefix: str = key("path of the dataset without .bin and .idx")
    weight: float = key("share of the blend, relative to the other weights", default=1.0, above=0)

    def __post_init__(self) -> None:
        check_ranges("data.blend", self)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`data`: the blend of corpora, in megatron-core's indexed format, and how it is split and
    cached.
    """

    name: str = key("name shown in reports")
    blend: tuple[CorpusConfig, ...] = key(
        "corpora and weights; empty takes the Python standard library's sources, if data.stdlib lets it",
        default=(),
    )
    valid: tuple[CorpusConfig, ...] = key(
        "corpora of held-out text of one's own, in the same format; empty holds out the validation share "
        "of data.split",
        default=(),
    )
    stdlib: bool = key(
        "take the Python standard library's sources where the blend is empty; false refuses to train then",
        default=True,
    )
    split: str = key("shares of training, validation and test documents", default="95,5,0")
    cache_dir: str = key("directory for built corpora and shuffle indices", default="data")
    tokenizer: TokenizerConfig = key("how text becomes token ids", factory=TokenizerConfig)

    def check_corpus(self) -> None:
        """Raise ConfigError where nothing says what to train on."""
        if not self.blend and not self.stdlib:
            rule = "this experiment takes no corpus by itself"
            remedy = (
                "name yours, data.blend=[{prefix: FOLDER/NAME}], with its data.tokenizer; or, for a trial on "
                "some megabytes of Python's sources, byte by byte, write data=stdlib"
            )
            raise ConfigError("data.blend", "[]", rule, remedy)


@dataclasses.dataclass(frozen=True)
class DataBuildConfig:
    """Root of `k2train data build`: text files in, one indexed dataset out."""

    input: tuple[str, ...] = key("files or directories: .txt, .jsonl, .parquet (also .gz for text)")
    output: str = key("path of the dataset without .bin and .idx")
    text_key: str = key("JSON key or Parquet column that holds the text", default="text")
    tokenizer: TokenizerConfig = key("how text becomes token ids", factory=TokenizerConfig)
    workers: int | None = key("processes; null takes one a core", default=None, unit="processes", minimum=1)
    on_bad_line: Literal["skip", "stop"] = key(
        "malformed lines are counted, named and skipped, or stop the build", default="skip"
    )
    overwrite: bool = key("replace an existing dataset", default=False)

    def __post_init__(self) -> None:
        check_ranges("", self)
        if not self.input:
            raise ConfigError("input", "[]", "needs at least one file or directory", "input=[a.txt,b.jsonl]")
