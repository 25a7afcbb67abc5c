"""Hydra multirun (`-m`): one job for each point of a sweep, through whichever launcher the config
names.

The default launcher runs the jobs one after another in this process;
`hydra/launcher=submitit_slurm` (extra `slurm`) submits them. Every point is composed and checked
before the first job starts.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from k2train.config.compose import expand_sweep, load_config, parse_overrides, permit, told
from k2train.config.errors import ConfigError
from k2train.config.folders import config_dir, group_files, search_path
from k2train.config.hydra_folders import hydra_compose, know_user_folders
from k2train.config.schema import Config

MULTIRUN = ("-m", "--multirun")
LAUNCHER = "hydra/launcher"


def is_multirun(args: Sequence[str]) -> bool:
    return any(word in MULTIRUN for word in args)


def without_flags(args: Sequence[str]) -> list[str]:
    """The overrides alone."""
    return [word for word in args if word not in MULTIRUN]


def run_sweep(args: Sequence[str], job: Callable[[Config, str], Any]) -> int:
    """Call `job(config, output_dir)` for every point of the sweep; returns the number of points.

    Raises ConfigError, before any job starts, for a mistake at any point or in the words for Hydra.
    """
    overrides = without_flags(args)
    points = expand_sweep([word for word in overrides if not word.startswith("hydra")])
    for point in points:
        load_config(point)
    parsed = parse_overrides(overrides)
    check_hydra_words([word for word in parsed if word.key_or_group.startswith("hydra")])

    def hydra_job(composed: DictConfig) -> Any:
        # Composed again from its words: what the user writes wins, which Hydra alone does not do.
        mine = HydraConfig.get()
        return job(load_config(list(mine.overrides.task)), mine.runtime.output_dir)

    groups = group_files(search_path())
    know_user_folders()
    sweep = hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")(hydra_job)
    try:
        with hydra_arguments(["--multirun", *(permit(word, groups) for word in parsed)]):
            sweep()
    except HydraException as error:
        # What a job raises passes through: it is no mistake in the words.
        raise ConfigError("config", " ".join(overrides), str(error).splitlines()[0]) from error
    return len(points)


def check_hydra_words(parsed: Sequence[Override]) -> None:
    """Raise ConfigError for `hydra...` words that Hydra refuses, such as a launcher that is not
    installed.
    """
    lines = [word.input_line or "" for word in parsed]
    try:
        with told(parsed):
            hydra_compose(config_dir(), "config", lines, with_hydra=True)
    except ConfigError as error:
        launchers = [word for word in parsed if word.key_or_group == LAUNCHER]
        if not launchers or "hydra/launcher" not in error.rule:
            raise
        name = str(launchers[0].value())
        remedy = "leave it out to run the points here, one after another"
        if name.startswith("submitit"):
            remedy = f"pip install 'k2train[slurm]', or {remedy}"
        raise ConfigError(LAUNCHER, name, "there is no such launcher here", remedy) from error


@contextlib.contextmanager
def hydra_arguments(words: Sequence[str]) -> Iterator[None]:
    """Within this context hydra.main reads these words, and lets exceptions through instead of
    printing them.
    """
    # hydra.main reads its words from sys.argv and from nowhere else, and this switch from the
    # environment.
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [sys.argv[0], *words], "1"
    try:
        yield
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR") if full is None else os.environ.update(HYDRA_FULL_ERROR=full)
