"""`run_on_ranks`: a config's run on every rank of its layout, as threads or as gloo processes, for
tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from k2train.config.schema import Config
from k2train.device.build import build_device
from k2train.device.protocol import Device
from k2train.parallel.communicator import World
from k2train.parallel.groups import build_groups
from k2train.parallel.testing import run_distributed_test
from k2train.trainer.build import Run, build_program, build_run, open_corpus

T = TypeVar("T")


def run_on_ranks(
    config: Config,
    fn: Callable[[Run], T],
    backend: Literal["threads", "processes"] = "threads",
    timeout_seconds: float = 120.0,
    make_device: Callable[[torch.device], Device] = build_device,
) -> list[T]:
    """What fn returned on every rank, by rank. It is called with the rank's run, before its first
    step, on the CPU.

    make_device: by default the CPU as it is.
    """
    program = build_program(config)
    corpus, layout, messages = open_corpus(config), program.layout, program.messages

    def run_rank(world: World) -> T:
        groups = build_groups(layout.grid, world, layout.relay_ranks, messages)
        return fn(build_run(program, corpus, groups, make_device(world.device)))

    return run_distributed_test(run_rank, layout.world, backend, timeout_seconds)
