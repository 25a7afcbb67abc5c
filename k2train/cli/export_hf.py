"""`k2train export-hf DIR run_dir=RUN`: a run's newest checkpoint, or a given one, as a Hugging Face model directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from k2train.checkpoint import (
    CheckpointError,
    checkpoint_problem,
    checkpoint_steps,
    latest_checkpoint,
    open_checkpoint,
)
from k2train.checkpoint.disk import check_new_directory, gigabytes
from k2train.checkpoint.hf_export import export_model, plan_export
from k2train.cli.hf_words import split_words
from k2train.config.convert import from_dict
from k2train.config.errors import ConfigError
from k2train.config.fields import check_ranges, key
from k2train.config.help import render_help
from k2train.config.sections import Dtype
from k2train.telemetry.progress import open_progress

USAGE = "k2train export-hf DIR run_dir=RUN|checkpoint=CHECKPOINT [dtype=bfloat16] [max_shard_bytes=5e9]"
DIR = "DIR is the model directory to write; it must be new or empty"


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The keys of export-hf."""

    run_dir: str | None = key("run whose newest checkpoint is exported", default=None)
    checkpoint: str | None = key("checkpoint directory to export, instead of run_dir", default=None)
    dtype: Dtype | None = key("type of the weights; null takes the one the run computed in, or what an imported "
                              "checkpoint holds", default=None)  # fmt: skip
    max_shard_bytes: int = key("largest file of the model", default=5_000_000_000, unit="bytes", minimum=1)

    def __post_init__(self) -> None:
        check_ranges("", self)
        if not self.run_dir and not self.checkpoint:
            raise ConfigError("run_dir", "(missing)", "one of run_dir and checkpoint must be given", USAGE)
        if self.run_dir and self.checkpoint:
            raise ConfigError("checkpoint", self.checkpoint, f"cannot be given together with run_dir={self.run_dir}",
                              "give one of the two")  # fmt: skip


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
    path = checkpoint_of(config)
    export = plan_export(open_checkpoint(path), config.dtype)
    print(f"{path}: {len(export.tensors)} tensors, {gigabytes(export.num_bytes)}, {export.dtype}")
    with open_progress("auto", "export", len(export.tensors)) as display:
        done = 0

        def on_bytes(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            display.advance(1, f"tensors  {gigabytes(done)} of {gigabytes(export.num_bytes)}")

        out = export_model(export, directory, max_shard_bytes=config.max_shard_bytes, on_bytes=on_bytes)
    print(f"model: {out}")
    print(f"open it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return 0


def checkpoint_of(config: ExportConfig) -> Path:
    """The checkpoint directory the user means. Raises ConfigError where a run has none that is complete."""
    if config.checkpoint:
        return Path(config.checkpoint)
    run_dir = Path(config.run_dir or "")
    if not run_dir.is_dir():
        raise ConfigError("run_dir", run_dir, "there is no such directory")
    root = run_dir / "checkpoints"
    newest = latest_checkpoint(root)
    if newest is None:
        problems = [checkpoint_problem(path) for _, path in checkpoint_steps(root)]
        raise CheckpointError(root, "this run has no complete checkpoint", problems[-1] if problems else
                              "let it reach one, or give checkpoint=DIR")  # fmt: skip
    return newest
