"""What a rank holds between forward and backward, action by action, against the simulator's curve
for the same list."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from k2train.config.compose import load_config
from k2train.model.context import Statistics
from k2train.planner.memory import level_at
from k2train.program import Program, compile_program
from k2train.schedule.actions import COMPUTE, Kind, Pair, parts
from k2train.schedule.costs import Costs
from k2train.schedule.simulate import simulate
from k2train.trainer.batch import read_batch
from k2train.trainer.step import run_schedule
from k2train.trainer.testing import run_on_ranks


class Meter:
    """Stands where a recorder stands: notes what is held whenever a compute step is about to begin,
    and at the end."""

    def __init__(self, run) -> None:
        self.run = run
        self.levels: list[int] = []

    def wait(self, message):
        return message.wait()

    def watch(self, steps):
        for step in steps:
            if isinstance(step, Pair) or step.kind in COMPUTE:
                self.note()
            yield step
        self.note()

    def note(self) -> None:
        self.levels.append(self.run.activations.device_bytes + self.run.training.queue.num_bytes())


def measured(config) -> list[list[int]]:
    """The levels of every stage in one step."""

    def run_rank(run):
        meter = Meter(run)
        run_schedule(run, read_batch(run, 0), Statistics(), meter)
        return meter.levels

    return run_on_ranks(config, run_rank)


def planned(program: Program) -> list[list[int]]:
    """The simulator's levels at the same moments: copies take no time, as on a CPU, and no layer is
    at work.

    A step that starts the moment its predecessor ends has already taken its forward's bytes then,
    so they are left out.
    """
    still = dict.fromkeys(
        ("forward_transient_bytes", "backward_transient_bytes", "offload_seconds", "reload_seconds"), 0
    )
    costs = tuple(dataclasses.replace(cost, **still) for cost in program.costs.virtual_stages)
    simulation = simulate(program.schedule, Costs(costs), record=True)
    # Ends are sums in another order than the curve's times.
    soon = 1e-9 * simulation.makespan_seconds
    curves = []
    for stage, curve in enumerate(simulation.memory):
        steps = [step for step in simulation.steps() if step[0] == stage]
        levels = [0]
        for (_, _, _, end), following in itertools.zip_longest(steps, steps[1:]):
            taken = 0
            if following is not None and following[2] <= end + soon:
                forwards = [action for action in parts(following[1]) if action.kind is Kind.F]
                taken = sum(
                    costs[f.virtual_stage].activation_bytes + costs[f.virtual_stage].offload_bytes
                    for f in forwards
                )
            levels.append(level_at(curve, end + soon) - taken)
        curves.append(levels)
    return curves


@pytest.mark.parametrize("activations", ["recompute", "recompute_fp8", "recompute_offload", "offload", "k2"])
@pytest.mark.parametrize(
    ("schedule", "pp", "vpp"), [("k2", 2, 2), ("1f1b", 3, 1), ("interleaved_1f1b", 2, 2)]
)
def test_memory_follows_the_simulators_curve(
    words, activations: str, schedule: str, pp: int, vpp: int
) -> None:
    """Within 5 % of the curve's peak at every step of the list, and the peak itself within 5 %."""
    config = load_config(
        [
            *words,
            f"activations={activations}",
            f"schedule={schedule}",
            f"layout.pp={pp}",
            f"layout.vpp={vpp}",
            "model.num_hidden_layers=6",
            "train.microbatch_size=1",
        ]
    )
    for mine, plan in zip(measured(config), planned(compile_program(config)), strict=True):
        assert len(mine) == len(plan)
        peak = max(plan)
        assert peak > 0
        assert max(mine) == pytest.approx(peak, rel=0.05)
        for level, expected in zip(mine, plan, strict=True):
            assert abs(level - expected) <= 0.05 * peak, (mine, plan)
