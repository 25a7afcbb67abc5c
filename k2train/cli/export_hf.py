"""`k2train export-hf DIR run_dir=RUN`: a run's newest checkpoint, or a given one, as a Hugging
Face model directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from k2train.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from k2train.checkpoint.disk import check_new_directory, gigabytes
from k2train.checkpoint.hf_export import HfExport, export_model, plan_export
from k2train.checkpoint.hf_tokenizer import TOKENIZER_FILE, TOKENIZER_KEY, tokenizer_meta
from k2train.cli.hf_words import split_words
from k2train.config.convert import from_dict
from k2train.config.data import TokenizerConfig
from k2train.config.errors import ConfigError
from k2train.config.fields import check_ranges, key
from k2train.config.help import render_help
from k2train.config.sections import Dtype
from k2train.data.tokenizer import build_tokenizer
from k2train.telemetry.progress import open_progress

USAGE = "k2train export-hf DIR run_dir=RUN|checkpoint=CHECKPOINT [dtype=bfloat16] [max_shard_bytes=5e9]"
DIR = "DIR is the model directory to write; it must be new or empty"


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The keys of export-hf."""

    run_dir: str | None = key("run whose newest checkpoint is exported", default=None)
    checkpoint: str | None = key("checkpoint directory to export, instead of run_dir", default=None)
    dtype: Dtype | None = key(
        "type of the weights; null takes the one the run computed in, or what an imported checkpoint holds",
        default=None,
    )
    max_shard_bytes: int = key("largest file of the model", default=5_000_000_000, unit="bytes", minimum=1)

    def __post_init__(self) -> None:
        check_ranges("", self)
        if not self.run_dir and not self.checkpoint:
            raise ConfigError("run_dir", "(missing)", "one of run_dir and checkpoint must be given", USAGE)
        if self.run_dir and self.checkpoint:
            raise ConfigError(
                "checkpoint",
                self.checkpoint,
                f"cannot be given together with run_dir={self.run_dir}",
                "give one of the two",
            )


def run(args: list[str]) -> int:
    """The command; returns the exit status. Raises ConfigError for every mistake of the user's."""
    if any(word in ("-h", "--help") for word in args):
        print(
            render_help(
                ExportConfig, "Turn a checkpoint into a Hugging Face model directory.", f"{USAGE}\n\n{DIR}"
            )
        )
        return 0
    directory, values = split_words(args, ("run_dir", "checkpoint"), DIR)
    config = from_dict(ExportConfig, values)
    check_new_directory("DIR", Path(directory))
    path = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(Path(config.run_dir or ""))
    checkpoint = open_checkpoint(path)
    export = plan_export(checkpoint, config.dtype, tokenizer_of(checkpoint))
    print(f"{path}: {len(export.tensors)} tensors, {gigabytes(export.num_bytes)}, {export.dtype}")
    with open_progress("auto", "export", len(export.tensors)) as display:
        done = 0

        def on_bytes(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            display.advance(1, f"tensors  {gigabytes(done)} of {gigabytes(export.num_bytes)}")

        out = export_model(export, directory, max_shard_bytes=config.max_shard_bytes, on_bytes=on_bytes)
    print(f"model: {out}")
    for line in tokenizer_lines(export, out):
        print(line)
    print(f"open it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return 0


def tokenizer_of(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """What is known of the tokenizer that the checkpoint's run was trained with; None for an
    imported model.

    Checkpoints from before it was recorded stand beside their run's config.yaml, which names it.
    """
    recorded: Mapping[str, Any] | None = checkpoint.meta.get(TOKENIZER_KEY)
    beside = checkpoint.directory.parent.parent / "config.yaml"
    if recorded is not None or "optimizer" not in checkpoint.meta or not beside.is_file():
        return recorded
    values = yaml.safe_load(beside.read_text(encoding="utf-8"))["data"]["tokenizer"]
    config = from_dict(TokenizerConfig, values, "data.tokenizer")
    return tokenizer_meta(config, build_tokenizer(config).eod_id)


def tokenizer_lines(export: HfExport, directory: Path) -> Iterator[str]:
    """What there is to know of the tokenizer beside the model."""
    if export.tokenizer is None:
        if export.tokens.get("eos_token_id") is None:
            yield "note: the checkpoint names no tokenizer, so eos_token_id is null and generation has no end of its own"
        return
    kind, path = export.tokenizer["kind"], export.tokenizer["path"]
    if any((directory / name).exists() for name in (TOKENIZER_FILE, "tiktoken.model")):
        yield f"tokenizer: {kind}, end of text {export.tokens['eos_token_id']}"
    else:
        yield f"note: the {kind} tokenizer {path} was not found; copy its files beside the model"
