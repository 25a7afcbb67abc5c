"""Checkpoints: named tensors under their Hugging Face names, in safetensors shards with a
checksummed manifest.

A checkpoint says nothing about the layout that wrote it, so any layout can resume from it by name.

    write_checkpoint(directory, tensors, meta)      one writer; begin, partial_path, write_shards,
                                                    read_entries, commit for many
    open_checkpoint(directory) -> Checkpoint        .meta .names() .load(name, rows) .verify()
    RowPiece, LazyTensor                            a row range of a tensor; a tensor made when its
                                                    turn comes
    step_directory, latest_checkpoint, newest_checkpoint, prune_checkpoints, checkpoint_steps,
    checkpoint_problem, clean_leftovers
    open_hf_model, import_model (hf_import); plan_export, export_model (hf_export)     Hugging Face,
        both ways
    CheckpointError                                 a ConfigError that names the directory or the
                                                    shard
"""

from k2train.checkpoint.errors import CheckpointError
from k2train.checkpoint.reader import Checkpoint, open_checkpoint
from k2train.checkpoint.run_checkpoints import (
    checkpoint_problem,
    checkpoint_steps,
    latest_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    step_directory,
)
from k2train.checkpoint.safetensors_file import LazyTensor
from k2train.checkpoint.staging import begin, clean_leftovers, partial_path
from k2train.checkpoint.writer import RowPiece, Storable, commit, read_entries, write_checkpoint, write_shards

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LazyTensor",
    "RowPiece",
    "Storable",
    "begin",
    "checkpoint_problem",
    "checkpoint_steps",
    "clean_leftovers",
    "commit",
    "latest_checkpoint",
    "newest_checkpoint",
    "open_checkpoint",
    "partial_path",
    "prune_checkpoints",
    "read_entries",
    "step_directory",
    "write_checkpoint",
    "write_shards",
]
