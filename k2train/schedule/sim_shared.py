"""What the simulated ranks share: costs, channels, the layouts of steps, and the record."""

from __future__ import annotations

import numpy as np

from k2train.schedule.actions import Action, Kind, Pair, Step
from k2train.schedule.costs import Costs, Phase, Stream, VirtualStageCosts
from k2train.schedule.overlap import Overlap, overlap
from k2train.schedule.program import Schedule
from k2train.schedule.simulation import Event

UNKNOWN = -1.0
"""A time that has not been computed yet; times are never negative."""


class Mailbox:
    """Messages of one kind (activations or gradients), by the cell (virtual stage, microbatch) that
    receives them."""

    def __init__(self, cells: int) -> None:
        self.sent = [UNKNOWN] * cells
        self.posted = [UNKNOWN] * cells
        self.arrived = [UNKNOWN] * cells


class Level:
    """Bytes over time, collected as changes in any order."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._changes: list[int] = []

    def add(self, time: float, change: int) -> None:
        if change:
            self._times.append(time)
            self._changes.append(change)

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Times in ascending order and the level from each on. At one moment, what is freed goes
        before what is taken."""
        times = np.asarray(self._times, dtype=np.float64)
        changes = np.asarray(self._changes, dtype=np.int64)
        order = np.lexsort((changes, times))
        return times[order], np.cumsum(changes[order])


class Shared:
    """State of a simulation that is not one rank's."""

    def __init__(self, schedule: Schedule, costs: Costs, record: bool) -> None:
        self.schedule = schedule
        self.costs = costs.virtual_stages
        self.record = record
        self.events: list[Event] = []
        self.woken: set[int] = set()
        cells = schedule.num_virtual_stages * schedule.num_microbatches
        self.forward_start = [UNKNOWN] * cells
        self.forward_done = [UNKNOWN] * cells
        self.backward_done = [UNKNOWN] * cells
        self.activations = Mailbox(cells)
        self.gradients = Mailbox(cells)
        self._channel_free: dict[tuple[int, int], float] = {}
        self._layouts: dict[tuple[Kind, int, int, float, float], Overlap] = {}

    def deliver(self, mailbox: Mailbox, kind: Kind, source: int, target: int, microbatch: int) -> None:
        """Move a message if it has been sent and posted. kind: SEND_F or SEND_B; source, target:
        virtual stages."""
        cell = target * self.schedule.num_microbatches + microbatch
        sent, posted = mailbox.sent[cell], mailbox.posted[cell]
        if sent == UNKNOWN or posted == UNKNOWN:
            return
        here, there = self.schedule.placement[source], self.schedule.placement[target]
        channel = (here, there)
        start = max(sent, posted, self._channel_free.get(channel, 0.0))
        costs = self.costs[source]
        end = start + (costs.send_forward_seconds if kind is Kind.SEND_F else costs.send_backward_seconds)
        self._channel_free[channel] = end
        mailbox.arrived[cell] = end
        self.woken.add(there)
        if self.record:
            action = Action(kind, source, microbatch)
            self.events.append(Event(here, "send", kind.value, action, start, end))

    def steady_window(self) -> tuple[float, float]:
        """From when the first microbatch of every chain is back until the last one of any chain
        enters."""
        width, chains = self.schedule.num_microbatches, self.schedule.chains
        runs = [(chain[0], self.schedule.microbatches_of(index)) for index, chain in enumerate(chains)]
        start = max(self.backward_done[entry * width + run[0]] for entry, run in runs)
        end = min(self.forward_start[entry * width + run[-1]] for entry, run in runs)
        return start, max(start, end)

    def layout(self, step: Step, compute_free: float, ep_free: float) -> Overlap:
        """The timing of a step that starts when its streams are that many seconds from free
        (negative: free already).

        Layouts are kept by step and offsets to the picosecond, which is far below what costs mean
        and makes nearly all slots of the steady phase alike.
        """
        offsets = (max(0.0, round(compute_free, 12)), max(0.0, round(ep_free, 12)))
        key = (*_key(step), *offsets)
        found = self._layouts.get(key)
        if found is None:
            found = self._layouts[key] = overlap(self._chains(*key[:3]), *offsets)
        return found

    def starts_on_ep(self, step: Step) -> bool:
        """Whether a step has an all-to-all that waits for no compute of its own: a backward's
        combine."""
        return any(chain and chain[0].stream is Stream.EP for chain in self._chains(*_key(step)))

    def _chains(self, kind: Kind, virtual_stage: int, partner: int) -> tuple[tuple[Phase, ...], ...]:
        """partner: the virtual stage of a pair's backward, or -1."""
        costs = self.costs[virtual_stage]
        if kind is Kind.W:
            return (_weight_grad(costs),)
        if kind is Kind.I:
            return (costs.backward_input,)
        if kind is Kind.B:
            return (costs.backward_input + _weight_grad(costs),)
        if partner < 0:
            return (costs.forward,)
        return (costs.forward, self.costs[partner].backward_input)


def _key(step: Step) -> tuple[Kind, int, int]:
    """What a step's chains depend on: kind, virtual stage, and the virtual stage of a pair's
    backward or -1."""
    if isinstance(step, Pair):
        return Kind.F, step.forward.virtual_stage, step.backward_input.virtual_stage
    return step.kind, step.virtual_stage, -1


def _weight_grad(costs: VirtualStageCosts) -> tuple[Phase, ...]:
    return (Phase("weight grad", Stream.COMPUTE, costs.weight_grad_seconds),)
