"""The `checkpoints/` directory of a run: `step-000100`, `step-000200`, ..., newest last."""

from __future__ import annotations

import os
import re
from pathlib import Path

from k2train.checkpoint.errors import CheckpointError
from k2train.checkpoint.reader import open_checkpoint
from k2train.checkpoint.staging import clean_leftovers, partial_path, remove
from k2train.config.errors import ConfigError

_STEP = re.compile(r"step-(\d+)")


def step_directory(checkpoints: Path | str, step: int) -> Path:
    """Where the checkpoint after `step` steps goes."""
    return Path(checkpoints) / f"step-{step:06d}"


def checkpoint_steps(checkpoints: Path | str) -> list[tuple[int, Path]]:
    """The (step, directory) of everything that carries a checkpoint's name, complete or not,
    oldest first."""
    root = Path(checkpoints)
    if not root.is_dir():
        return []
    found = [(_STEP.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def checkpoint_problem(directory: Path | str) -> str:
    """Why a checkpoint is not complete (no manifest, a shard missing or of the wrong size);
    empty if it is."""
    try:
        checkpoint = open_checkpoint(directory)
        for shard in checkpoint.manifest.shards:
            checkpoint.check_size(shard)
    except CheckpointError as error:
        return str(error)
    return ""


def latest_checkpoint(checkpoints: Path | str) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Temporary and incomplete directories are passed over.

    A run that starts calls `clean_leftovers` first, which settles a replacement that was cut off.
    """
    for _, path in reversed(checkpoint_steps(checkpoints)):
        if not checkpoint_problem(path):
            return path
    return None


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest complete checkpoint of a run. Raises ConfigError where it has none."""
    if not run_dir.is_dir():
        raise ConfigError("run_dir", run_dir, "there is no such directory")
    root = run_dir / "checkpoints"
    newest = latest_checkpoint(root)
    if newest is None:
        problems = [checkpoint_problem(path) for _, path in checkpoint_steps(root)]
        remedy = problems[-1] if problems else "let it reach one, or give checkpoint=DIR"
        raise CheckpointError(root, "this run has no complete checkpoint", remedy)
    return newest


def prune_checkpoints(checkpoints: Path | str, keep: int) -> list[Path]:
    """Delete all but the `keep` newest complete checkpoints, and what killed writers left; returns
    what was deleted.

    One rank calls it, while no checkpoint is being written. A deletion that is cut off leaves a
    `.partial`, never a checkpoint with holes.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete every checkpoint")
    deleted = clean_leftovers(Path(checkpoints)) if Path(checkpoints).is_dir() else []
    kept = 0
    for _, path in reversed(checkpoint_steps(checkpoints)):
        if kept < keep:
            kept += not checkpoint_problem(path)
            continue
        doomed = partial_path(path)
        os.rename(path, doomed)
        remove(doomed)
        deleted.append(path)
    return deleted
