"""The simulator: how long a step takes, where it waits, and what it holds in memory.

Every stage stands for one rank, with a compute stream, an expert-parallel channel, a channel to
every other stage, and one copy stream in each direction. What a rank does is fixed by its list, and
every stream runs in order, so a time is the maximum of earlier times plus a duration, and no event
queue is needed: each stage is advanced until it needs a message that has not been sent, and goes on
when it has. The result does not depend on the order of advancing.

Rules:
- a step starts when the compute stream is free and its inputs are there; a pair when those of both
are. Its last all-to-all
  may still run while the next step computes, and where a step begins with an all-to-all (a
  backward's combine), that
  one may run under the compute step before it, which in K2's slots is the weight gradient. The
  runtime does so by events:
  an all-to-all waits for its own inputs, and the compute stream for an all-to-all where it reads
  the result
  (docs/schedule.md, "Who waits for what");
- a SEND is ready when its forward or backward has finished, not when the whole pair has;
- a RECV or a RELOAD takes effect when the compute step listed before it has left the compute
stream;
- a message starts when sent and posted and its channel is free; each ordered pair of stages is one
channel;
- an OFFLOAD starts when its forward has finished, a RELOAD after its OFFLOAD; each direction does
one at a time;
- a full backward is the input gradient, then the weight gradient, and what it sends is ready at its
end.
"""

from __future__ import annotations

from collections import deque

from k2train.schedule.actions import MESSAGES, Kind, Pair
from k2train.schedule.costs import Costs
from k2train.schedule.errors import ScheduleError
from k2train.schedule.p2p import sends_of
from k2train.schedule.program import Schedule
from k2train.schedule.sim_rank import Rank
from k2train.schedule.sim_shared import Shared
from k2train.schedule.simulation import Simulation


def simulate(schedule: Schedule, costs: Costs, record: bool = False) -> Simulation:
    """Run a schedule on paper.

    costs: for every virtual stage of the schedule. record: keep what `Simulation.events` needs.
    Raises ScheduleError where the schedule deadlocks or lacks its sends and receives; `validate`
    says more.
    """
    _check(schedule, costs)
    shared = Shared(schedule, costs, record)
    ranks = [Rank(stage, shared) for stage in range(schedule.num_stages)]
    waiting = deque(ranks)
    while waiting:
        waiting.popleft().advance()
        while shared.woken:
            rank = ranks[shared.woken.pop()]
            if rank not in waiting:
                waiting.append(rank)
    if not all(rank.finished for rank in ranks):
        raise ScheduleError("the schedule stands still before its end; validate it to see the cycle")
    makespan = max(rank.end for rank in ranks)
    steady = shared.steady_window()
    return Simulation(
        schedule,
        makespan,
        steady,
        tuple(rank.times(makespan, steady) for rank in ranks),
        tuple(rank.device.curve() for rank in ranks),
        tuple(rank.host.curve() for rank in ranks),
        tuple(tuple(rank.records) for rank in ranks),
        tuple(shared.events),
    )


def _check(schedule: Schedule, costs: Costs) -> None:
    given, needed = len(costs.virtual_stages), schedule.num_virtual_stages
    if given != needed:
        raise ValueError(f"costs for {given} virtual stages do not fit a schedule with {needed}")
    if schedule.kinds & MESSAGES:
        return
    for line in schedule.stages:
        for step in line:
            action = step.forward if isinstance(step, Pair) else step
            if action.kind is not Kind.W and sends_of(schedule, action) is not None:
                raise ScheduleError("the schedule has no sends and receives; apply insert_p2p")
