"""How long the phases of the learning rate are in steps.

One owner: the schedule, and the length of a run, ask here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from k2train.config.errors import ConfigError
from k2train.config.optim import LrPhase

FROM_PHASES = "phases"
"""The value of `train.steps` for a run as long as `optim.lr_phases`."""


def phase_steps(phase: LrPhase, total_steps: int, tokens_per_step: int) -> float:
    """Length of a phase in steps, rounded to a millionth: 0.1 of 30 steps ends at step 3, not just
    behind it.
    """
    if phase.steps is not None:
        return float(phase.steps)
    if phase.tokens is not None:
        return round(phase.tokens / tokens_per_step, 6)
    assert phase.fraction is not None, "LrPhase checks that one length is given"
    return round(phase.fraction * total_steps, 6)


def steps_of(phases: Sequence[LrPhase], tokens_per_step: int) -> int:
    """The whole steps that all phases take.

    Raises ConfigError where one of them is a fraction of the steps.
    """
    if any(phase.fraction is not None for phase in phases):
        rule = "a phase of optim.lr_phases is a fraction of these steps"
        remedy = "give a number of steps, or every phase its length in steps or tokens"
        raise ConfigError("train.steps", FROM_PHASES, rule, remedy)
    exact = sum(phase_steps(phase, 0, tokens_per_step) for phase in phases)
    return max(1, math.ceil(round(exact, 6)))
