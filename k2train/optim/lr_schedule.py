"""The learning rate as a list of phases: warm-up, constant, cosine, annealing.

A phase leads from the rate where the previous one ended (0 before the first) to its own `to`. Step
s is the one that makes the s+1st update, so it reads the schedule at position s + 1: the first of n
warm-up steps has 1/n of the peak, the last of a phase has exactly its `to`, and no step has rate 0
unless a phase says so.

        to_1 ........._________
                     /         \\
                    /           `-.__
        0 ---------'                 `------ to_3, held for ever
                   linear constant cosine

Source: K2 report, section 2.5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from k2train.config.errors import ConfigError
from k2train.config.optim import LrPhase
from k2train.config.phases import phase_steps


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """A phase with its place: positions in (start, end], in steps."""

    kind: str
    start: float
    end: float
    origin: float
    to: float

    def at(self, position: float) -> float:
        if self.kind == "constant":
            return self.to
        done = (position - self.start) / (self.end - self.start)
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.origin + (self.to - self.origin) * done


class LrSchedule:
    """Learning rate of every step.

    phases: lengths in steps, in tokens (divided by `tokens_per_step`; need not be whole steps) or
    as a fraction of `total_steps`. They simply follow one another: past the last, its `to` holds; a
    sum beyond total_steps is cut off by the end of the run. A phase of length 0 takes no step, but
    the next one starts from its `to`. Raises ConfigError where every rate is 0, for then nothing
    would train.
    """

    def __init__(self, phases: Sequence[LrPhase], total_steps: int, tokens_per_step: int) -> None:
        if not any(phase.to for phase in phases):
            raise ConfigError(
                "optim.lr_phases",
                [phase.to for phase in phases],
                "every rate is 0, nothing would train",
                "give at least one phase a `to` above 0, for example 2e-4",
            )
        self._stretches: list[_Stretch] = []
        position, rate = 0.0, 0.0
        for phase in phases:
            end = round(position + phase_steps(phase, total_steps, tokens_per_step), 6)
            if end > position:
                self._stretches.append(_Stretch(phase.kind, position, end, rate, phase.to))
            position, rate = end, phase.to
        self._last = rate

    def at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        for stretch in self._stretches:
            if stretch.start < step + 1 <= stretch.end:
                return stretch.at(step + 1)
        return self._last
