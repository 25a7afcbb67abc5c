"""Memory of every stage by kind, on the device and on the host, against what the cluster has.

What does not change within a step (parameters, gradient sums, optimizer states) comes from the
estimate; what does comes from the simulator: it is run again with one kind of bytes at a time,
which changes no time, and each kind is read off at the moment the stage is fullest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k2train.estimate.states import StageStates, stage_states
from k2train.layout.layout import Layout
from k2train.program import Program
from k2train.schedule.costs import Costs
from k2train.schedule.program import Schedule
from k2train.schedule.simulate import simulate
from k2train.schedule.simulation import Simulation


@dataclass(frozen=True)
class StageMemory:
    """One stage's fullest rank. Bytes; the parts of the device's peak are those of one moment."""

    stage: int
    parameters: int
    gradients: int
    optimizer_on_device: int
    """The states, or the slots that they pass through where they live on the host."""
    activations: int
    """Saved between forward and backward, on their way to or from the host included."""
    transient: int
    """Exchange buffers, rebuilt tensors and gradients of the layer at work, logits."""
    weight_queue: int
    """Inputs and output gradients that wait for their weight gradient."""
    reserved: int
    capacity: int
    optimizer_on_host: int
    """For each rank."""
    activations_on_host: int
    """Offloaded at once, for each rank, at most."""
    node: int
    """Host memory of the fullest node that this stage has ranks on."""
    host_capacity: int
    ranks_per_node: int

    @property
    def states(self) -> int:
        """What stays on the device from step to step."""
        return self.parameters + self.gradients + self.optimizer_on_device

    @property
    def device(self) -> int:
        """Everything on the device at its fullest."""
        return self.states + self.activations + self.transient + self.weight_queue + self.reserved

    @property
    def fits_device(self) -> bool:
        return self.device <= self.capacity

    @property
    def fits_host(self) -> bool:
        return self.node <= self.host_capacity


def all_stage_states(program: Program) -> tuple[StageStates, ...]:
    """Parameters, gradients and optimizer states of every stage."""
    config, layout, copies = program.config, program.layout, program.parameter_copies
    owners = (layout.dp * copies, layout.edp * copies)
    return tuple(
        stage_states(
            program.pieces_of(stage), config.model, config.optim, config.train.dtype, layout.ep, owners
        )
        for stage in range(layout.pp)
    )


def stage_memories(
    program: Program, simulation: Simulation, states: Sequence[StageStates]
) -> tuple[StageMemory, ...]:
    """The memory of every stage. simulation: of the program's schedule and costs."""
    config = program.config
    cluster, layout = config.cluster, program.layout
    on_host = config.optim.states == "host"
    kinds = peak_by_kind(_short_enough(program, simulation), program.costs)
    hosted = simulation.peak_host_bytes
    per_rank = [
        hosted[stage] + (of_stage.optimizer_bytes if on_host else 0) for stage, of_stage in enumerate(states)
    ]
    return tuple(
        StageMemory(
            stage=stage,
            parameters=of_stage.parameter_bytes,
            gradients=of_stage.gradient_bytes,
            optimizer_on_device=of_stage.staging_bytes if on_host else of_stage.optimizer_bytes,
            activations=kinds[stage][0],
            transient=kinds[stage][1],
            weight_queue=kinds[stage][2],
            reserved=round(cluster.reserved_device_bytes),
            capacity=round(cluster.device_memory_bytes),
            optimizer_on_host=of_stage.optimizer_bytes if on_host else 0,
            activations_on_host=hosted[stage],
            node=fullest_node(layout, stage, per_rank),
            host_capacity=round(cluster.host_memory_bytes),
            ranks_per_node=min(cluster.gpus_per_node, layout.world),
        )
        for stage, of_stage in enumerate(states)
    )


def fullest_node(layout: Layout, stage: int, bytes_per_rank: Sequence[int]) -> int:
    """Host bytes of the fullest node among those with ranks of a stage. bytes_per_rank: by stage.

    A node may hold ranks of several stages; those of one stage are neighbours, so its first node,
    its last and one in between are all there is to look at.
    """
    first, last = (layout.node_of(rank) for rank in (stage * layout.dp, (stage + 1) * layout.dp - 1))
    nodes = {first, min(first + 1, last), last}
    return max(
        sum(bytes_per_rank[rank // layout.dp] for rank in layout.ranks_of_node(node)) for node in nodes
    )


def _short_enough(program: Program, simulation: Simulation) -> Simulation:
    """A step of few microbatches with the same peaks, where there is one: the steady phase repeats
    itself."""
    if program.short_schedule is program.schedule:
        return simulation
    brief = simulate(program.short_schedule, program.costs)
    return brief if brief.peak_bytes == simulation.peak_bytes else simulation


def peak_by_kind(simulation: Simulation, costs: Costs) -> list[tuple[int, int, int]]:
    """(activations, transient, weight queue) of every stage when it is fullest. costs: those
    simulated."""
    activations = _rerun(simulation.schedule, costs, "offload_bytes", "activation_bytes")
    queue = _rerun(simulation.schedule, costs, "weight_queue_bytes")
    kinds = []
    for stage, (times, level) in enumerate(simulation.memory):
        if not len(level):
            kinds.append((0, 0, 0))
            continue
        moment, total = times[int(level.argmax())], int(level.max())
        saved, queued = level_at(activations.memory[stage], moment), level_at(queue.memory[stage], moment)
        kinds.append((saved, total - saved - queued, queued))
    return kinds


_BYTES = (
    "offload_bytes",
    "activation_bytes",
    "forward_transient_bytes",
    "backward_transient_bytes",
    "weight_queue_bytes",
)


def _rerun(schedule: Schedule, costs: Costs, *kept: str) -> Simulation:
    """The same step with every kind of bytes but those `kept` set to zero."""
    zeros = dict.fromkeys(set(_BYTES) - set(kept), 0)
    changed = tuple(dataclasses.replace(cost, **zeros) for cost in costs.virtual_stages)  # type: ignore[arg-type]
    return simulate(schedule, Costs(changed))


def level_at(curve: tuple[np.ndarray, np.ndarray], moment: float) -> int:
    """The bytes of a curve just after a moment."""
    times, level = curve
    index = int(np.searchsorted(times, moment, side="right")) - 1
    return int(level[index]) if index >= 0 else 0


def sampled(curve: tuple[np.ndarray, np.ndarray], end: float, points: int = 200) -> list[int]:
    """The highest level in each of `points` equal stretches of a step, for pictures and files."""
    times, level = curve
    peaks = np.zeros(points, dtype=np.int64)
    if not len(times) or end <= 0:
        return peaks.tolist()
    edges = np.linspace(0.0, end, points + 1)
    for index in range(points):
        peaks[index] = level_at(curve, edges[index])
    slots = np.minimum((times / end * points).astype(np.int64), points - 1)
    np.maximum.at(peaks, slots, level)
    return peaks.tolist()
