"""A recorded step: when each action of a stage's list began and ended, as a trace in the format of
the planned one.

`recorder.watch(steps)` stands between the list and the executor, so a step that is not recorded
pays nothing. What an action waits for a message is told apart, because that is where an executed
step differs from its plan.

    recorder = Recorder(clock)
    with stage.step(dataclasses.replace(inputs, wait=recorder.wait)):
        run_actions(recorder.watch(steps), stage)

Times are the host's. On a GPU the clock should first wait for the compute stream, or boxes show
when work was launched; the recorded step is then slower than the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch

from k2train.schedule.actions import Action, Kind, Pair, Step, parse_step, parts
from k2train.schedule.colours import BACKWARD, FORWARD, WEIGHT
from k2train.schedule.trace import Box

PAIR, WAIT = "forward and input gradient", "wait for a message"
_STREAMS = {
    Kind.SEND_F: "send",
    Kind.SEND_B: "send_back",
    Kind.RECV_F: "receive",
    Kind.RECV_B: "receive",
    Kind.OFFLOAD: "d2h",
    Kind.RELOAD: "h2d",
}
_CATEGORIES = {
    Kind.F: FORWARD,
    Kind.B: BACKWARD,
    Kind.I: BACKWARD,
    Kind.W: WEIGHT,
    Kind.SEND_F: "send activations",
    Kind.SEND_B: "send gradients",
    Kind.RECV_F: "receive activations",
    Kind.RECV_B: "receive gradients",
    Kind.OFFLOAD: "offload",
    Kind.RELOAD: "reload",
}


class Message(Protocol):
    """What can be waited for: runtime.stage.Arrival."""

    def wait(self) -> torch.Tensor: ...


class Watcher(Protocol):
    """Stands between an action list and the executor: `Recorder`, or whatever else follows a
    step."""

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same steps; each has ended when the next one is asked for."""
        ...

    def wait(self, message: Message) -> torch.Tensor:
        """Wait for a message."""
        ...


class Record(NamedTuple):
    """One step of the list as it ran. Seconds from the recorder's start; the wait for messages is
    its first part."""

    step: Step
    start: float
    end: float
    wait_seconds: float


class Recorder:
    """Notes one pass over an action list. Its zero is the moment it is made."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.records: list[Record] = []
        self._clock = clock
        self._zero = clock()
        self._waited = 0.0

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same steps; each has ended when the next one is asked for."""
        for step in steps:
            self._waited = 0.0
            start = self._clock()
            yield step
            self.records.append(Record(step, start - self._zero, self._clock() - self._zero, self._waited))

    def wait(self, message: Message) -> torch.Tensor:
        """Wait for a message and add the time to the step under way."""
        start = self._clock()
        tensor = message.wait()
        self._waited += self._clock() - start
        return tensor


def to_json(records: Iterable[Record]) -> list[tuple[str, float, float, float]]:
    """Records as JSON holds them, to travel between ranks."""
    return [(str(record.step), *record[1:]) for record in records]


def from_json(values: Iterable[tuple[str, float, float, float]]) -> list[Record]:
    """The inverse of `to_json`."""
    return [Record(parse_step(step), *times) for step, *times in values]


def trace_boxes(stage: int, records: Iterable[Record]) -> Iterator[Box]:
    """The boxes of one stage: its compute, its waits, and how long it took to hand over sends and
    post receives."""
    for step, start, end, wait_seconds in records:
        action = parts(step)[0]
        begin = min(start + wait_seconds, end)
        if wait_seconds > 0:
            yield Box(stage, "compute", f"wait {step}", WAIT, start, begin, action)
        yield Box(stage, _stream(step), str(step), _category(step), begin, end, action)


def _stream(step: Step) -> str:
    return "compute" if isinstance(step, Pair) else _STREAMS.get(step.kind, "compute")


def _category(step: Action | Pair) -> str:
    return PAIR if isinstance(step, Pair) else _CATEGORIES[step.kind]
