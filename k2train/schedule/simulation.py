"""What a simulated step answers: times, waits, memory, and the events of a timeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from k2train.schedule.actions import Action, Step, parts
from k2train.schedule.overlap import Overlap
from k2train.schedule.program import Schedule


class Waits(NamedTuple):
    """Seconds the compute stream stands still, by what it waits for."""

    ep: float = 0.0
    """An all-to-all of its own step."""
    pp: float = 0.0
    """A message that has been produced and has not arrived."""
    copy: float = 0.0
    """A RELOAD."""
    bubble: float = 0.0
    """A neighbour that has not produced its input yet, or the end of the step."""

    @property
    def total(self) -> float:
        return self.ep + self.pp + self.copy + self.bubble

    def plus(self, other: Waits) -> Waits:
        return Waits(*(a + b for a, b in zip(self, other, strict=True)))


class StageTimes(NamedTuple):
    """Where a stage's step goes. Busy and all waits add up to the makespan."""

    busy_seconds: float
    warmup: Waits
    """Until the first microbatch has come all the way back."""
    steady: Waits
    cooldown: Waits
    """From the moment the last microbatch enters."""

    @property
    def waits(self) -> Waits:
        return self.warmup.plus(self.steady).plus(self.cooldown)

    @property
    def bubble_seconds(self) -> float:
        return self.waits.bubble

    @property
    def idle_seconds(self) -> float:
        return self.waits.total


class Event(NamedTuple):
    """A box of the timeline."""

    stage: int
    stream: str
    """compute, ep, send, d2h or h2d."""
    name: str
    """A phase's name, or the kind of action where it has one phase."""
    action: Action
    start: float
    end: float


class StepRecord(NamedTuple):
    """A compute step as it ran."""

    step: Step
    start: float
    layout: Overlap


@dataclass(frozen=True)
class Simulation:
    """The answer of `simulate`. Seconds and bytes; one entry per stage where there are several."""

    schedule: Schedule
    makespan_seconds: float
    steady_window: tuple[float, float]
    """From when the first microbatch has come all the way back until the last one enters: the
    pipeline is full and has found its pace. Empty (both equal) where there are too few microbatches
    for that."""
    stages: tuple[StageTimes, ...]
    memory: tuple[tuple[np.ndarray, np.ndarray], ...]
    """For each stage, the times at which the bytes on the device change, and the bytes from then
    on: activations, transient buffers and weight-gradient queue. Parameters and the like are not
    the schedule's."""
    host_memory: tuple[tuple[np.ndarray, np.ndarray], ...]
    """The same for offloaded bytes in host memory."""
    compute_records: tuple[tuple[StepRecord, ...], ...]
    """The compute steps of every stage in order; empty unless recorded."""
    other_events: tuple[Event, ...]
    """Messages and copies; empty unless recorded."""

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """The most bytes on each stage's device."""
        return tuple(int(level.max(initial=0)) for _, level in self.memory)

    @property
    def peak_host_bytes(self) -> tuple[int, ...]:
        """The most offloaded bytes in host memory, for each stage."""
        return tuple(int(level.max(initial=0)) for _, level in self.host_memory)

    @property
    def slowest_stage(self) -> int:
        """The stage with the most compute. It sets the pace: the others wait for it in any case,
        and what they wait for last is a message, so exposed traffic is best read here."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].busy_seconds)

    @property
    def bubble_share(self) -> tuple[float, ...]:
        """Bubble seconds of each stage over the makespan."""
        return tuple(stage.bubble_seconds / self.makespan_seconds for stage in self.stages)

    def events(self, start: float = 0.0, end: float = float("inf")) -> Iterator[Event]:
        """Boxes that overlap a window, phase by phase. The simulation must have been recorded."""
        for stage in range(len(self.compute_records)):
            yield from self.events_of(stage, start, end)
        for event in self.other_events:
            if event.start < end and event.end > start:
                yield event

    def events_of(self, stage: int, start: float = 0.0, end: float = float("inf")) -> Iterator[Event]:
        """The compute and all-to-all boxes of one stage that overlap a window, compute steps in
        order."""
        for record in self.compute_records[stage]:
            if record.start < end:
                yield from self._phases(stage, record, start, end)

    @staticmethod
    def _phases(stage: int, record: StepRecord, start: float, end: float) -> Iterator[Event]:
        actions = parts(record.step)
        for chain, phase, opens, closes in record.layout.spans:
            first, last = record.start + opens, record.start + closes
            if first < end and last > start:
                yield Event(stage, phase.stream.value, phase.name, actions[chain], first, last)

    def steps(self) -> Iterator[tuple[int, Step, float, float]]:
        """(stage, step, start, end) of every compute step, without its phases."""
        for stage, records in enumerate(self.compute_records):
            for record in records:
                layout = record.layout
                yield (
                    stage,
                    record.step,
                    record.start + layout.compute_start,
                    record.start + layout.compute_end,
                )
