"""What the simulator needs to know about a virtual stage. The `estimate` room fills it in from
model and cluster.

Seconds and bytes of one microbatch on one rank. A forward or an input-gradient backward is a list
of phases that run one after another, each on the compute stream or, for all-to-alls, on the
expert-parallel (EP) channel:

    MoE layer, forward     attention (compute) | route (ep) | dispatch (ep) | experts (compute) |
                           combine (ep)
    MoE layer, backward    combine (ep) | experts (compute) | dispatch (ep) | route (ep, 0 s) |
                           attention (compute)

`route` is where ranks tell each other their choices and the host waits for the counts. Its backward
does nothing; it is a step all the same, so that the halves of a pair stay in time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any


class Stream(str, Enum):
    """Where a phase runs."""

    COMPUTE = "compute"
    EP = "ep"


@dataclass(frozen=True)
class Phase:
    """A piece of a forward or a backward that runs on one stream."""

    name: str
    stream: Stream
    seconds: float

    def __post_init__(self) -> None:
        _check_number("seconds", self.seconds)


@dataclass(frozen=True)
class VirtualStageCosts:
    """Seconds and bytes of one microbatch on one virtual stage."""

    forward: tuple[Phase, ...]
    """Phases of F."""
    backward_input: tuple[Phase, ...]
    """Phases of I, in the order they run; B runs them too, and then the weight gradient."""
    weight_grad_seconds: float = 0.0
    """W, on the compute stream."""
    send_forward_seconds: float = 0.0
    """Activations on their way to the next stage, first byte to last."""
    send_backward_seconds: float = 0.0
    """Gradient on its way to the previous stage."""
    offload_seconds: float = 0.0
    """Device to host, of `offload_bytes`."""
    reload_seconds: float = 0.0
    """Host to device, of `offload_bytes`."""
    offload_bytes: int = 0
    """Saved by F and movable: on the device between F and the end of OFFLOAD, and from RELOAD to
    the end of the backward; all the time where a schedule offloads nothing."""
    activation_bytes: int = 0
    """Saved by F and never offloaded: on the device between F and the end of the backward."""
    forward_transient_bytes: int = 0
    """Needed while F runs and free afterwards."""
    backward_transient_bytes: int = 0
    """Needed while I or B runs and free afterwards."""
    weight_queue_bytes: int = 0
    """Kept from I to W: inputs and output gradients of linear layers."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, tuple):
                _check_number(field.name, value)


@dataclass(frozen=True)
class Costs:
    """Costs of every virtual stage of a schedule, by index."""

    virtual_stages: tuple[VirtualStageCosts, ...]


def uniform_costs(
    num_virtual_stages: int,
    forward: float = 1.0,
    backward_input: float = 1.0,
    weight_grad: float = 1.0,
    hop: float = 0.0,
) -> Costs:
    """The same seconds everywhere and no all-to-all: the setting of bubble formulas. hop: every
    send."""
    one = VirtualStageCosts(
        (Phase("forward", Stream.COMPUTE, forward),),
        (Phase("backward", Stream.COMPUTE, backward_input),),
        weight_grad,
        send_forward_seconds=hop,
        send_backward_seconds=hop,
    )
    return Costs((one,) * num_virtual_stages)


def without(costs: Costs, ep: bool = False, pp: bool = False, copies: bool = False) -> Costs:
    """The same costs with all-to-alls, pipeline messages or copies taking no time.

    The difference of two makespans says what a kind of traffic costs the step. That can be less
    than the time a stage is seen waiting for it: a stage that is not the slowest would otherwise
    wait for something else.
    """

    def kept(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        if not ep:
            return phases
        return tuple(replace(phase, seconds=0.0) if phase.stream is Stream.EP else phase for phase in phases)

    changes: dict[str, Any] = dict.fromkeys(
        ["send_forward_seconds", "send_backward_seconds"] if pp else [], 0.0
    )
    changes |= dict.fromkeys(["offload_seconds", "reload_seconds"] if copies else [], 0.0)
    return Costs(
        tuple(
            replace(one, forward=kept(one.forward), backward_input=kept(one.backward_input), **changes)
            for one in costs.virtual_stages
        )
    )


def _check_number(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, not {value}")
