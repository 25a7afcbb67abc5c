"""Refuse at start-up what this machine's host memory cannot hold, with the numbers, before any
tensor is made.

Counted is what the plan counts: optimizer states that live in host memory (on a CPU device they all
do) and the most bytes of activations that are offloaded at once, of every rank on this machine.
They are compared with the node of the config (`cluster.host_memory_bytes`) and with what the
machine has available at this moment. Everything is computed from the config, so no rank has to ask
another; and the step is simulated only where something is offloaded.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.estimate.states import stage_states
from k2train.layout.layout import Layout
from k2train.program import Program
from k2train.schedule.simulate import simulate
from k2train.trainer.worlds import WorldKind


@dataclasses.dataclass(frozen=True)
class HostNeed:
    """Bytes that the ranks of one machine keep in its host memory."""

    activations: int
    optimizer: int
    num_ranks: int

    @property
    def total(self) -> int:
        return self.activations + self.optimizer


@dataclasses.dataclass(frozen=True)
class HostRoom:
    """Bytes of one machine: what the config says a node has, and what is available now."""

    cluster: int
    available: int


def check_host_memory(
    program: Program, kind: WorldKind, device: torch.device, environment: Mapping[str, str]
) -> None:
    """Raise ConfigError where this machine cannot hold what its ranks will keep in host memory.

    Every process calls it with its launcher's environment; it communicates with nobody.
    """
    config, layout = program.config, program.layout
    ranks = ranks_here(layout, kind, environment)
    peaks = offload_peaks(program)
    need = host_need(program, ranks, device, peaks)
    room = HostRoom(round(config.cluster.host_memory_bytes), available_bytes())
    movable = config.optim.states == "host" and device.type != "cpu"
    refuse_too_little(need, room, movable)
    for stage in sorted({rank // layout.dp for rank in ranks}):
        refuse_small_share(stage, peaks[stage], activation_share(program, stage, device))


def refuse_too_little(need: HostNeed, room: HostRoom, movable: bool) -> None:
    """Raise ConfigError for more bytes than either limit. movable: whether the states could live on
    the device instead."""
    if need.total <= min(room.cluster, room.available):
        return
    if need.total > room.cluster:
        field, limit = "cluster.host_memory_bytes", room.cluster
    else:
        field, limit = "host memory", room.available
    remedies = ["set optim.states=device"] if movable else []
    if need.activations:
        remedies.append("offload less (activations=recompute_fp8 or activations=none)")
    raise ConfigError(
        field,
        _gb(limit),
        f"{need.num_ranks} rank(s) on this machine keep {_gb(need.total)} in host memory: {_gb(need.activations)} "
        f"of offloaded activations and {_gb(need.optimizer)} of optimizer states; the config gives a node "
        f"{_gb(room.cluster)}, and {_gb(room.available)} are available",
        "; or ".join([*remedies, "use more nodes (layout.nodes)"]),
    )


def refuse_small_share(stage: int, peak: int, share: int) -> None:
    """Raise ConfigError where a rank of a stage offloads more at once than its share, though the
    node may have it."""
    if peak > share:
        raise ConfigError(
            "cluster.host_memory_bytes",
            _gb(share),
            f"is one rank's share of a node without its optimizer states, and a rank of stage {stage} offloads "
            f"up to {_gb(peak)} of activations",
            "offload less (activations=recompute_fp8 or activations=none); or use more nodes (layout.nodes)",
        )


def activation_share(program: Program, stage: int, device: torch.device) -> int:
    """The host memory that a rank of a stage may fill with offloaded activations.

    Its equal share of the node that the config describes, less its own optimizer states where they
    live there too. The store is limited to this, and a plan that needs more is refused.
    """
    cluster = program.config.cluster
    share = round(cluster.host_memory_bytes / min(cluster.gpus_per_node, program.layout.world))
    states = states_bytes(program, stage, 1) if states_in_host_memory(program.config, device) else 0
    return max(0, share - states)


def states_in_host_memory(config: Config, device: torch.device) -> bool:
    """Whether optimizer states take host memory: asked for, or because the device is the host."""
    return config.optim.states == "host" or device.type == "cpu"


def host_need(
    program: Program, ranks: range, device: torch.device, peaks: Sequence[int] | None = None
) -> HostNeed:
    """What these ranks keep in host memory. peaks: the program's `offload_peaks`, where they are
    known."""
    by_stage = Counter(rank // program.layout.dp for rank in ranks)
    optimizer = 0
    if states_in_host_memory(program.config, device):
        optimizer = sum(states_bytes(program, stage, count) for stage, count in by_stage.items())
    peaks = peaks or offload_peaks(program)
    activations = sum(peaks[stage] * count for stage, count in by_stage.items())
    return HostNeed(activations, optimizer, len(ranks))


def states_bytes(program: Program, stage: int, num_ranks: int) -> int:
    """Optimizer states of some ranks of a stage: of the fullest, but no more than the whole stage
    has."""
    config, layout = program.config, program.layout
    pieces, owners = program.pieces_of(stage), (layout.dp, layout.edp)
    states = stage_states(pieces, config.model, config.optim, config.train.dtype, layout.ep, owners)
    return min(num_ranks * states.optimizer_bytes, round(layout.dp * states.optimizer_mean_bytes))


def offload_peaks(program: Program) -> tuple[int, ...]:
    """The most bytes a rank of each stage has offloaded at once.

    A short step is simulated, if anything is offloaded: it reaches the most early in its steady
    phase.
    """
    if not program.config.activations.offloads:
        return (0,) * program.layout.pp
    return tuple(simulate(program.short_schedule, program.costs).peak_host_bytes)


def ranks_here(layout: Layout, kind: WorldKind, environment: Mapping[str, str]) -> range:
    """The ranks on this machine: all of them where they are threads, else as many as the launcher
    started here."""
    if kind != "processes":
        return range(layout.world)
    rank, local = (int(environment.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    first = rank - local
    return range(first, min(first + int(environment.get("LOCAL_WORLD_SIZE", "1")), layout.world))


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that programs can still have on this machine; where the system does not say, all that
    it has."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f} GB"
