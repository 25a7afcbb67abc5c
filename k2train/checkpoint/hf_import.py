"""A Hugging Face model directory into a checkpoint: everything is checked first, then copied tensor
by tensor.

Types stay as they are stored, bit for bit; only block-FP8 weights become BF16.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k2train.checkpoint.disk import check_free_space, check_new_directory, disk_errors
from k2train.checkpoint.hf_config import TOKEN_FIELDS, fp8_block_size, read_config_file, to_model_config
from k2train.checkpoint.hf_source import CheckedTensors, check_tensors, locate_tensors
from k2train.checkpoint.reader import open_checkpoint
from k2train.checkpoint.staging import staged
from k2train.checkpoint.writer import DEFAULT_SHARD_BYTES, commit, write_manifest, write_shards
from k2train.config.convert import to_dict
from k2train.config.model import ModelConfig

GENERATION_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class HfModel:
    """A Hugging Face directory that can be imported: nothing of it is read yet but the headers."""

    directory: Path
    model: ModelConfig
    checked: CheckedTensors
    tokens: dict[str, Any]
    generation: dict[str, Any] | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as they will be stored."""
        return sum(tensor.num_bytes for _, tensor in self.checked.tensors)


def open_hf_model(directory: Path | str) -> HfModel:
    """Read config.json and all headers. Raises ConfigError for what is unsupported, missing, extra
    or misshapen."""
    directory = Path(directory)
    hf = read_config_file(directory)
    model = to_model_config(hf)
    checked = check_tensors(locate_tensors(directory), model, fp8_block_size(hf), directory)
    tokens = {name: hf[name] for name in TOKEN_FIELDS if name in hf}
    return HfModel(directory, model, checked, tokens, _generation_config(directory))


def import_model(
    source: HfModel,
    out: Path | str,
    *,
    verify: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> Path:
    """Write the checkpoint `out` with tensors `model/<name>`; returns its absolute path.

    `verify` reads every shard again before the checkpoint appears under its name. `on_bytes` is
    told each tensor's size once it is written. On any failure, Ctrl-C included, nothing is left.
    Raises ConfigError if `out` exists and is not empty, or the disk is too small.
    """
    directory = Path(out).resolve()
    check_new_directory("out", directory)
    check_free_space("out", directory, source.num_bytes)
    meta = {
        "kind": "import",
        "step": 0,
        "model": to_dict(source.model),
        "hf": {"tokens": source.tokens, "generation_config": source.generation},
    }
    tensors = ((f"model/{name}", tensor) for name, tensor in source.checked.tensors)
    with disk_errors("out", directory), staged(directory) as temporary:
        entries = write_shards(temporary, "model", tensors, max_shard_bytes, on_bytes)
        if verify:
            write_manifest(temporary, entries, meta)
            open_checkpoint(temporary).verify()
        commit(temporary, directory, entries, meta)
    return directory


def _generation_config(directory: Path) -> dict[str, Any] | None:
    """generation_config.json, a courtesy that export gives back; one that cannot be read is no
    reason to stop."""
    try:
        data = json.loads((directory / GENERATION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
