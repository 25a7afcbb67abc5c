"""`k2train train`: one run, or with -m one run for each point of a sweep."""

from __future__ import annotations

import dataclasses
import os
import sys

from k2train.cli import launch
from k2train.cli.answers import answered
from k2train.config.compose import load_run
from k2train.config.schema import Config
from k2train.config.sweep import is_multirun, run_sweep

CHECK = "--check"
USAGE = """k2train train [group=name ...] [key=value ...]
       k2train train -m key=a,b,c ...        one run for each value (Hydra multirun)
       k2train train --check key=value ...   say whether this run can start, and start nothing

A run directory that holds a checkpoint is resumed: k2train train run_dir=DIR takes the run's own config.yaml, and
words after it change that.
SIGTERM and Ctrl-C finish the step, write a checkpoint and exit with 0; a second Ctrl-C stops at once."""

NOT_JOINED = """  A rank was not started, or the ranks do not reach one another at MASTER_ADDR:MASTER_PORT; what another rank printed
  may be the cause. Start all of them again with the same words and the same run_dir."""


def run(args: list[str]) -> int:
    """Train; 0 when done or stopped on request, 1 where the loss became non-finite or ranks lost
    one another.
    """
    if answered(args, "Train a model.", USAGE, load_run, ("plan", "rehearse")):
        return 0
    if CHECK in args:
        return check(load_run([word for word in args if word != CHECK]))
    if is_multirun(args):
        run_sweep(args, train_point)
        return 0
    return train_once(load_run(args), args)


def check(config: Config) -> int:
    """Find the mistakes that every rank would find, before a launcher starts them.

    WORLD_SIZE says how many it will start.
    """
    from k2train.trainer.check_start import check_start
    from k2train.trainer.loop import prepare

    prepared = prepare(config)
    layout = prepared.program.layout
    check_start(prepared.program.config, layout)
    print(
        f"{layout.world} rank(s) on {prepared.device.type} as {prepared.kind}: pp {layout.pp} x edp {layout.edp} x ep {layout.ep}, "
        f"{prepared.program.schedule.num_microbatches} microbatches a pipeline"
    )
    return 0


def train_once(config: Config, words: list[str]) -> int:
    """One run: in processes that are started for it where that is asked for, else in this one."""
    # OpenMP's threads spin while they wait; on a machine whose cores are shared, two spinning ranks
    # or a busy neighbour cost a factor of ten (docs/decisions/0003). It is read when torch is
    # loaded, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if launch.is_wanted(config, os.environ):
        return launch.launch(train_here, config, words)
    return train_here(config, words)


def train_here(config: Config, words: list[str]) -> int:
    """This process's part of a run, with its failure told in lines instead of a traceback."""
    # Imported here: torch takes seconds, and --help and mistakes in the config do not need it.
    from k2train.parallel.communicator import CommunicationError, JoinError
    from k2train.trainer.loop import TrainingDivergedError, train

    try:
        train(config, words)
    except TrainingDivergedError as error:
        print(f"k2train train: {error}", file=sys.stderr)
        return 1
    except JoinError as error:
        print(f"k2train train: {error}\n{NOT_JOINED}", file=sys.stderr, flush=True)
        return 1
    except CommunicationError as error:
        print(f"k2train train: {lost(error, config.train.timeout_seconds)}", file=sys.stderr, flush=True)
        return 1
    return 0


def lost(error: Exception, timeout_seconds: float) -> str:
    """What a rank says when it has lost the others."""
    return (
        f"{error}\n"
        f"  A rank died or did not answer within train.timeout_seconds={timeout_seconds:g}; the first rank to fail, and what\n"
        f"  it printed, is the cause. Start with the same words and the same run_dir to go on from the last checkpoint."
    )


def train_point(config: Config, output_dir: str) -> int:
    """One point of a sweep, in the directory Hydra made for it unless the config names one."""
    if config.run_dir is None:
        config = dataclasses.replace(config, run_dir=output_dir)
    return train_once(config, [])
