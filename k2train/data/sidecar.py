"""PREFIX.json: what an indexed dataset holds, written beside it by `k2train data build`.

megatron-core's format stores ids and lengths but not which tokenizer made them, so a corpus read
with the wrong one trains on nonsense without an error. The side-car lets training check that.
Datasets that other programs wrote have none and are taken as they are; their ids are checked
against the vocabulary as they are read.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from k2train.config.convert import from_dict
from k2train.config.errors import ConfigError
from k2train.config.fields import key
from k2train.data.tokenizer import Tokenizer

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The facts of one dataset."""

    format: int = key("version of this file")
    tokenizer: str = key("name of the tokenizer")
    tokenizer_identity: str = key("equal exactly for tokenizers that map text to ids alike")
    vocab_size: int = key("ids are below this")
    eod_id: int = key("id after every document")
    num_documents: int = key("documents")
    num_tokens: int = key("ids, end-of-document ids included")
    num_bytes: int = key("UTF-8 bytes of the text")
    num_bad_lines: int = key("malformed lines left out", default=0)


def sidecar_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def read_sidecar(prefix: str | Path, field: str) -> Sidecar | None:
    """The side-car of `prefix`, None where there is none. Raises ConfigError (under `field`) if it
    cannot be read."""
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    remedy = "build the dataset again, or remove this file to read the dataset without its check"
    try:
        sidecar = from_dict(Sidecar, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(field, path, f"is not a readable side-car: {first}", remedy) from error
    if sidecar.format != FORMAT:
        raise ConfigError(
            field, path, f"has format {sidecar.format}, this version reads format {FORMAT}", remedy
        )
    return sidecar


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    path.write_text(json.dumps(dataclasses.asdict(sidecar), indent=2) + "\n", encoding="utf-8")


def check_tokenizer(sidecar: Sidecar, tokenizer: Tokenizer, prefix: str, field: str) -> None:
    """Raise ConfigError unless `tokenizer` is the one that made the dataset."""
    if sidecar.tokenizer_identity != tokenizer.identity:
        raise ConfigError(
            field,
            prefix,
            f"was built with the tokenizer {sidecar.tokenizer}, this run has {tokenizer.name}",
            "set data.tokenizer to the one that built it, or build the dataset again",
        )
