"""The words of a schedule: actions, pairs, and their text form.

A schedule is a list of actions for every pipeline stage. An action names a kind, a virtual stage
and a microbatch, and nothing else: where a virtual stage lives and what comes after it belong to
the `Schedule`. The text form is the kind followed by `virtual_stage.microbatch`:

    F2.5            forward of microbatch 5 on virtual stage 2
    RECV_B2.5       receive the gradient that virtual stage 2 needs for the backward of microbatch 5
    F2.6+I2.1       a pair: this forward and this input-gradient backward run together

Actions are named tuples rather than dataclasses because K2's full step holds half a million of them
and a named tuple is built three times faster. Source: docs/design.md, "Schedule".
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple, TypeAlias


class Kind(str, Enum):
    """What an action does. Every message and copy is named after the virtual stage that owns the
    line it stands in."""

    F = "F"
    """Forward."""
    B = "B"
    """Full backward: input gradient, then weight gradient."""
    I = "I"  # noqa: E741 - the field's letter for the input gradient
    """Input-gradient backward; leaves its weight gradient in the queue."""
    W = "W"
    """Weight gradient: drains the queue of one (virtual stage, microbatch)."""
    SEND_F = "SEND_F"
    """Send the activations this virtual stage has just produced to the next one."""
    RECV_F = "RECV_F"
    """Post the receive of the activations this virtual stage's forward needs."""
    SEND_B = "SEND_B"
    """Send the gradient this virtual stage has just produced to the previous one."""
    RECV_B = "RECV_B"
    """Post the receive of the gradient this virtual stage's backward needs."""
    OFFLOAD = "OFFLOAD"
    """Start copying what the forward saved to host memory."""
    RELOAD = "RELOAD"
    """Start copying it back for the backward."""

    # Enum's own hash is a Python function; the text's hash is in C and twice as fast in
    # dictionaries.
    __hash__ = str.__hash__

    def __str__(self) -> str:
        return self.value


class Action(NamedTuple):
    """One thing a stage does for one microbatch on one of its virtual stages."""

    kind: Kind
    virtual_stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.virtual_stage}.{self.microbatch}"


class Pair(NamedTuple):
    """A forward (F) and an input-gradient backward (I) executed together, phases interleaved.

    The pair is atomic: it starts when the inputs of both have arrived. Usually the two belong to
    different microbatches and often to different virtual stages of the same stage.
    """

    forward: Action
    backward_input: Action

    def __str__(self) -> str:
        return f"{self.forward}+{self.backward_input}"


Step: TypeAlias = Action | Pair
"""An entry of a stage's list."""

BACKWARDS = frozenset({Kind.B, Kind.I})
"""Kinds that consume a microbatch's activations."""
COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
MESSAGES = frozenset({Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B})
COPIES = frozenset({Kind.OFFLOAD, Kind.RELOAD})

_ACTION = re.compile(r"([A-Z]+(?:_[FB])?)(\d+)\.(\d+)")
_KINDS = {kind.value: kind for kind in Kind}


def parse_action(text: str) -> Action:
    """The inverse of `str(action)`. Raises ValueError."""
    match = _ACTION.fullmatch(text)
    if match is None or match[1] not in _KINDS:
        raise ValueError(
            f"{text!r} is not an action: expected a kind, a virtual stage, a dot and a microbatch, as in F2.5"
        )
    return Action(_KINDS[match[1]], int(match[2]), int(match[3]))


def parse_step(text: str) -> Step:
    """The inverse of `str(step)`: an action, or `F2.6+I2.1` for a pair. Raises ValueError."""
    first, plus, second = text.partition("+")
    if not plus:
        return parse_action(first)
    pair = Pair(parse_action(first), parse_action(second))
    if pair.forward.kind is not Kind.F or pair.backward_input.kind is not Kind.I:
        raise ValueError(f"{text!r} is not a pair: expected a forward and an input gradient, as in F2.6+I2.1")
    return pair


def parse_line(text: str) -> tuple[Step, ...]:
    """A stage's list from its text form, steps separated by blanks. Raises ValueError."""
    return tuple(parse_step(word) for word in text.split())


def format_line(steps: tuple[Step, ...]) -> str:
    """A stage's list as text, steps separated by blanks."""
    return " ".join(map(str, steps))


def parts(step: Step) -> tuple[Action, ...]:
    """The actions inside a step: two for a pair, the action itself otherwise."""
    return tuple(step) if isinstance(step, Pair) else (step,)
