"""How ranks run: one process each under a launcher, threads of this process, or a single rank.

`world=auto` takes processes where a launcher (torchrun, Slurm with torchrun) has set its variables,
a single rank where the layout has one, and threads otherwise, which is how any layout runs on a
laptop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch

from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.config.sections import TrainConfig
from k2train.layout.layout import Layout
from k2train.parallel.communicator import World
from k2train.parallel.processes import process_world
from k2train.parallel.threads import run_threads
from k2train.trainer.cores import bound_to_cores, pci_address

T = TypeVar("T")
WorldKind = Literal["single", "threads", "processes"]

LOCAL_RUN = "k2train-local"
"""The name, in TORCHELASTIC_RUN_ID, of a run whose processes `k2train train world=processes`
started itself."""


def fit_to_launcher(config: Config, environment: Mapping[str, str]) -> Config:
    """With a launcher, and neither layout.nodes nor layout.edp given, as many replicas as it
    started ranks for.

    Raises ConfigError where its ranks do not make whole model-parallel groups.
    """
    layout = config.layout
    launched = int(environment.get("WORLD_SIZE", "0"))
    if (
        config.world not in ("auto", "processes")
        or not launched
        or layout.edp is not None
        or layout.nodes is not None
    ):
        return config
    group = layout.pp * layout.ep
    if launched % group:
        raise ConfigError(
            "layout",
            f"pp {layout.pp} x ep {layout.ep}",
            f"the launcher started {launched} ranks, not a multiple of {group}",
            f"start {max(group, launched // group * group)} ranks, or change layout.pp or layout.ep",
        )
    return dataclasses.replace(config, layout=dataclasses.replace(layout, edp=launched // group))


def choose_world(
    config: Config, layout: Layout, device: torch.device, environment: Mapping[str, str]
) -> WorldKind:
    """The kind of world for `config.world`. Raises ConfigError where it does not fit the layout or
    the launcher."""
    launched = "WORLD_SIZE" in environment
    kind: WorldKind
    if config.world != "auto":
        kind = config.world
    else:
        kind = "processes" if launched else "single" if layout.world == 1 else "threads"
    if kind == "single" and layout.world != 1:
        raise ConfigError(
            "world", "single", f"the layout has {layout.world} ranks", "set world=threads, or layout=single"
        )
    if kind == "processes" and launched and int(environment["WORLD_SIZE"]) != layout.world:
        raise ConfigError(
            "layout",
            f"{layout.world} ranks",
            f"the launcher started {environment['WORLD_SIZE']}",
            "change the launcher's ranks, or layout.nodes and layout.edp",
        )
    if kind == "threads" and device.type != "cpu":
        raise ConfigError("world", kind, "threads share one CPU", "set train.device=cpu, or world=processes")
    return kind


def local_device(device: torch.device, environment: Mapping[str, str]) -> torch.device:
    """This rank's device: on CUDA the launcher's LOCAL_RANK says which."""
    if device.type != "cuda":
        return device
    index = int(environment.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def gpu_addresses(device: torch.device) -> list[str]:
    """The PCI addresses of the GPUs that this process sees, in their order; none where `device` is
    the CPU."""
    if device.type != "cuda":
        return []
    return [
        pci_address(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())
    ]


def run_world(
    kind: WorldKind, size: int, device: torch.device, train: TrainConfig, fn: Callable[[World], T]
) -> T:
    """Run `fn` on every rank of the world; the result of this process's rank (of rank 0 for
    threads)."""
    if kind == "threads":
        return run_threads(size, fn, device)[0]
    device = local_device(device, os.environ)
    bind = kind == "processes" and train.bind_cores
    with (
        bound_to_cores(os.environ, gpu_addresses(device)) if bind else contextlib.nullcontext(),
        process_world(kind, device, train.timeout_seconds) as world,
    ):
        return fn(world)
