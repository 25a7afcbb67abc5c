"""The run directory: config.yaml, metrics.jsonl, checkpoints/, tensorboard/, loss.png; and what may
change on resume.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import yaml

from k2train.checkpoint import clean_leftovers, latest_checkpoint
from k2train.config.convert import to_dict
from k2train.config.errors import ConfigError
from k2train.config.schema import Config

# The weights of a run fix its model and its precision; everything else may change between one start
# and the next.
FIXED_ON_RESUME = ("model.", "train.dtype", "optim.name")
# Sections that say where and how a run is carried out, not what it computes.
NEUTRAL_ON_RESUME = (
    "run_dir",
    "name",
    "telemetry.",
    "plan.",
    "cluster.",
    "world",
    "train.keep_checkpoints",
    "data.cache_dir",
    "train.checkpoint_every_steps",
    "train.checkpoint_every_minutes",
    "train.device",
    "train.timeout_seconds",
)


def choose_run_dir(config: Config) -> Path:
    """`run_dir` as given, else a new directory under runs/ named by the run and the time."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{count}" for count in range(2, 1000))):
        candidate = Path("runs") / f"{config.name}-{stamp}{suffix}"
        if not candidate.exists():
            return candidate
    raise ConfigError(
        "run_dir", "null", f"a thousand runs called {config.name} started in this second", "give run_dir"
    )


def open_run_dir(config: Config) -> tuple[Path, Path | None, list[str]]:
    """Make or reopen the run directory and write config.yaml.

    Returns the directory, the checkpoint to resume from (None for a new run) and the keys that
    differ from the config of the run so far. Raises ConfigError where a difference makes resuming
    impossible, or where the directory cannot be written.
    """
    run_dir = choose_run_dir(config)
    if (run_dir / "checkpoints").is_dir():
        # First of all: it may put back a checkpoint whose replacement was cut off between two
        # renames.
        clean_leftovers(run_dir / "checkpoints")
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    changes = config_changes(run_dir / "config.yaml", config) if checkpoint else []
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        temporary = run_dir / "config.yaml.tmp"
        temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        os.replace(temporary, run_dir / "config.yaml")
    except OSError as error:
        raise ConfigError(
            "run_dir", run_dir, f"cannot be written: {error.strerror}", "give another run_dir"
        ) from error
    return run_dir, checkpoint, changes


def config_changes(path: Path, config: Config) -> list[str]:
    """The changed keys as `key: old -> new`. Raises ConfigError for a key that the weights fix."""
    if not path.exists():
        return []
    before, now = _flatten(yaml.safe_load(path.read_text())), _flatten(to_dict(config))
    changes = []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or key.startswith(NEUTRAL_ON_RESUME):
            continue
        if key.startswith(FIXED_ON_RESUME):
            raise ConfigError(
                key,
                now.get(key),
                f"the run in {path.parent} was made with {before.get(key)}",
                "set it back, or start anew with another run_dir",
            )
        changes.append(f"{key}: {before.get(key)} -> {now.get(key)}")
    return changes


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        leaf: item
        for key, child in value.items()
        for leaf, item in _flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }
