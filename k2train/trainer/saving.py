"""What a checkpoint of a run holds, and how a run takes it over again.

Names are those of the optimizer's states (`master/<tensor>`, `momentum/<tensor>`, ...) and
`model/<tensor>` for the correction biases, which no optimizer owns. The parameters themselves are
the masters rounded to the compute type, so they are not stored twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from k2train.checkpoint import (
    Checkpoint,
    Storable,
    begin,
    commit,
    open_checkpoint,
    prune_checkpoints,
    read_entries,
    step_directory,
    write_shards,
)
from k2train.checkpoint.hf_tokenizer import TOKENIZER_KEY, tokenizer_meta
from k2train.checkpoint.staging import partial_path
from k2train.checkpoint.writer import RowPiece
from k2train.config.convert import to_dict
from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig
from k2train.model.pieces import Piece
from k2train.trainer.build import Run
from k2train.update_rules.rule import MASTER


def save(run: Run, run_dir: Path, steps_done: int) -> Path:
    """Write the checkpoint after `steps_done` steps, then delete the oldest beyond
    train.keep_checkpoints.

    Every rank must call it: each writes the shards of what it owns, and once all have (a barrier),
    rank 0 completes the checkpoint; nobody goes on before that.
    """
    world, checkpoints = run.groups.world, run_dir / "checkpoints"
    directory = step_directory(checkpoints, steps_done)
    if run.is_main:
        begin(directory)
    world.barrier()
    temporary = partial_path(directory)
    write_shards(temporary, f"rank-{world.rank:05}", run_tensors(run))
    world.barrier()
    if run.is_main:
        entries = read_entries(temporary, [f"rank-{rank:05}" for rank in range(world.size)])
        commit(temporary, directory, entries, run_meta(run, steps_done))
        prune_checkpoints(checkpoints, run.config.train.keep_checkpoints)
    world.barrier()
    return directory


def run_tensors(run: Run) -> Iterator[tuple[str, Storable]]:
    """Everything this rank owns, by checkpoint name."""
    for state in run.optimizer.state():
        yield state.name, RowPiece(state.tensor, state.start, state.shape[0])
    if run.groups.dp.rank == 0:
        for piece in bias_pieces(run):
            yield f"model/{piece.name}", piece.tensor


def run_meta(run: Run, steps_done: int) -> dict[str, Any]:
    """What a reader needs besides the tensors."""
    return {
        "step": steps_done,
        "dtype": run.config.train.dtype,
        "model": to_dict(run.config.model),
        "optimizer": run.config.optim.name,
        "data": run.corpus.identity,
        TOKENIZER_KEY: tokenizer_meta(run.config.data.tokenizer, run.corpus.tokenizer.eod_id),
    }


def resume(run: Run, directory: Path) -> int:
    """Continue exactly where the checkpoint in `directory` ended; the number of steps it had done.

    Raises ConfigError where it is damaged or belongs to another model. Every rank must call it: an
    all-gather a bucket.
    """
    checkpoint = open_checkpoint(directory)
    check_model(run.config.model, checkpoint)
    run.optimizer.load(lambda name, start, stop: checkpoint.load(name, (start, stop)))
    load_biases(run, checkpoint)
    return int(checkpoint.meta["step"])


def start_from(run: Run, directory: Path) -> None:
    """Take over only the weights of a checkpoint, a run's or an imported one, with fresh optimizer
    states.

    Every rank must call it: an all-gather a bucket.
    """
    checkpoint = open_named("train.init_from", directory)
    check_model(run.config.model, checkpoint)

    def lookup(name: str, start: int, stop: int) -> torch.Tensor:
        kind, _, tensor = name.partition("/")
        if kind != MASTER:
            return torch.zeros(())
        return checkpoint.load(name if name in checkpoint else f"model/{tensor}", (start, stop))

    run.optimizer.load(lookup)
    load_biases(run, checkpoint)


def open_named(field: str, directory: Path) -> Checkpoint:
    """The checkpoint that the key `field` names. Raises ConfigError of that key where it cannot be
    opened."""
    try:
        return open_checkpoint(directory)
    except ConfigError as error:
        raise ConfigError(field, directory, error.rule, error.remedy) from error


def load_biases(run: Run, checkpoint: Checkpoint) -> None:
    for piece in bias_pieces(run):
        piece.tensor.copy_(checkpoint.load(f"model/{piece.name}"))


def bias_pieces(run: Run) -> Iterator[Piece]:
    """The correction biases held here: the only model tensors without an optimizer."""
    for model in run.models.values():
        yield from (piece for piece in model.pieces() if not piece.trained)


# Settings that change neither names nor shapes of tensors: a checkpoint fits whatever they are.
_FREE = {"initializer_range", "rope_scaling", "max_position_embeddings"}


def check_model(model: ModelConfig, checkpoint: Checkpoint) -> None:
    """The checkpoint's model must be the configured one, but for what YaRN stretches."""
    stored = checkpoint.meta.get("model", {})
    for field in dataclasses.fields(model):
        mine = to_dict(getattr(model, field.name))
        if field.name in stored and stored[field.name] != mine and field.name not in _FREE:
            raise ConfigError(
                f"model.{field.name}",
                mine,
                f"the checkpoint in {checkpoint.directory} has {stored[field.name]}",
                "use the checkpoint's model, or another checkpoint",
            )
