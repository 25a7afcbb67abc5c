"""`Plan`: everything `k2train plan` says about one config. Bytes, seconds, tokens; GB in reports is
1e9 bytes.

A step is the simulated pipeline, then what follows it: gradients reduced, the update, parameters
gathered. Waits are reported for the busiest stage, because the others stand still for its sake.
Source: docs/design.md, "The one idea".
"""

from __future__ import annotations

from dataclasses import dataclass

from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.estimate.states import StageStates
from k2train.estimate.step import UpdateSeconds, model_flops_utilisation, step_flops, update_seconds
from k2train.estimate.work import Machine
from k2train.planner.memory import StageMemory, all_stage_states, stage_memories
from k2train.program import Program, compile_program
from k2train.schedule.errors import told_as_config
from k2train.schedule.simulate import simulate
from k2train.schedule.simulation import Simulation, StageTimes


@dataclass(frozen=True)
class Plan:
    """The answer to one config."""

    program: Program
    simulation: Simulation
    states: tuple[StageStates, ...]
    memory: tuple[StageMemory, ...]
    updates: tuple[UpdateSeconds, ...]
    """The end of the step, for every stage."""

    @property
    def config(self) -> Config:
        return self.program.config

    @property
    def step_seconds(self) -> float:
        """From the first forward until every rank has its new parameters."""
        return self.simulation.makespan_seconds + self.slowest_update.total

    @property
    def slowest_update(self) -> UpdateSeconds:
        return max(self.updates, key=lambda update: update.total)

    @property
    def tokens_per_second(self) -> float:
        return self.config.train.global_batch_tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: causal attention counted, recomputation not."""
        train, cluster = self.config.train, self.config.cluster
        flops = step_flops(self.config.model, train.seq_len, train.global_batch_tokens)
        peak = cluster.matmul_flops_per_second
        return model_flops_utilisation(flops, self.step_seconds, self.program.layout.world, peak)

    @property
    def busiest_stage(self) -> int:
        """The stage with the most compute, of equals the one that waits most for communication."""
        stages = self.simulation.stages
        return max(
            range(len(stages)), key=lambda i: (round(stages[i].busy_seconds, 9), _communication(stages[i]))
        )

    @property
    def busiest(self) -> StageTimes:
        return self.simulation.stages[self.busiest_stage]

    @property
    def bubble_share(self) -> float:
        """Bubble of the busiest stage over the pipeline's time."""
        return self.busiest.bubble_seconds / self.simulation.makespan_seconds

    @property
    def fullest(self) -> StageMemory:
        """The stage with least room on its devices."""
        return max(self.memory, key=lambda stage: stage.device)

    @property
    def fullest_host(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.node)

    @property
    def fits(self) -> bool:
        return all(stage.fits_device and stage.fits_host for stage in self.memory)


def _communication(stage: StageTimes) -> float:
    waits = stage.waits
    return waits.ep + waits.pp + waits.copy


def build_plan(config: Config, record: bool = False, check: bool = True) -> Plan:
    """Plan one config: compile it and plan the program. The arguments are those of
    `plan_program`."""
    check_dispatch(config)
    return plan_program(compile_program(config), record, check)


def plan_program(program: Program, record: bool = False, check: bool = True) -> Plan:
    """Plan one program.

    record: keep what timelines and traces need. check: prove the schedule first, which for a long
    step takes as long as the simulation. Raises ConfigError, also for a schedule that cannot run.
    """
    simulation = _simulated(program, record, check)
    states = all_stage_states(program)
    memory = stage_memories(program, simulation, states)
    config = program.config
    machine = Machine(config.cluster, config.train.dtype)
    updates = tuple(
        update_seconds(of_stage, program.layout, config.optim, machine, program.parameter_copies)
        for of_stage in states
    )
    return Plan(program, simulation, states, memory, updates)


def _simulated(program: Program, record: bool, check: bool) -> Simulation:
    if check:
        _ = program.report
    with told_as_config(program.config.schedule):
        return simulate(program.schedule, program.costs, record)


def check_dispatch(config: Config) -> None:
    """Raise ConfigError for an all-to-all by CUDA kernels on a cluster without GPUs."""
    if config.layout.dispatch == "deepep" and config.layout.ep > 1 and config.cluster.kind == "cpu":
        rule = f"its kernels run on GPUs, and cluster={config.cluster.name} has none"
        raise ConfigError("layout.dispatch", "deepep", rule, "use layout.dispatch=per_node, or cluster=h100")
