"""Hydra multirun (`-m`): one job for each point of a sweep, through whichever launcher the config names.

The default launcher runs the jobs one after another in this process; `hydra/launcher=submitit_slurm` (extra `slurm`)
submits them. Every point is composed and checked before the first job starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from k2train.config.compose import config_dir, expand_sweep, load_config, parse_overrides, permit
from k2train.config.convert import from_dict
from k2train.config.schema import Config

MULTIRUN = ("-m", "--multirun")


def is_multirun(args: Sequence[str]) -> bool:
    return any(word in MULTIRUN for word in args)


def without_flags(args: Sequence[str]) -> list[str]:
    """The overrides alone."""
    return [word for word in args if word not in MULTIRUN]


def run_sweep(args: Sequence[str], job: Callable[[Config, str], Any]) -> int:
    """Call `job(config, output_dir)` for every point of the sweep; returns the number of points.

    Raises ConfigError, before any job starts, for a mistake at any point.
    """
    overrides = without_flags(args)
    points = expand_sweep([word for word in overrides if not word.startswith("hydra")])
    for point in points:
        load_config(point)

    def hydra_job(composed: DictConfig) -> Any:
        plain = OmegaConf.to_container(composed, resolve=True)
        return job(from_dict(Config, plain), HydraConfig.get().runtime.output_dir)

    # hydra.main reads its words from sys.argv and from nowhere else.
    words, sys.argv = (
        sys.argv,
        [sys.argv[0], "--multirun", *(permit(override) for override in parse_overrides(overrides))],
    )
    try:
        hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")(hydra_job)()
    finally:
        sys.argv = words
    return len(points)
