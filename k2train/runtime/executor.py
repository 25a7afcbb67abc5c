"""The executor: takes the steps of one stage's action list in order and hands each to its handler.

It decides nothing. Order, pairing, the place of weight gradients, messages and copies all come from
the schedule, which the validator has proved and the simulator has costed; so what runs is what was
planned (docs/design.md, "The one idea").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from k2train.schedule.actions import Action, Kind, Pair, Step


class Handlers(Protocol):
    """What a stage can do. Every method takes the action's virtual stage and microbatch."""

    def forward(self, virtual_stage: int, microbatch: int) -> None: ...

    def input_gradient(self, virtual_stage: int, microbatch: int) -> None: ...

    def weight_gradient(self, virtual_stage: int, microbatch: int) -> None: ...

    def pair(self, forward: tuple[int, int], backward: tuple[int, int]) -> None:
        """Run a forward and an input gradient, each (virtual stage, microbatch), phases in turn."""

    def send_activation(self, virtual_stage: int, microbatch: int) -> None: ...

    def receive_activation(self, virtual_stage: int, microbatch: int) -> None: ...

    def send_gradient(self, virtual_stage: int, microbatch: int) -> None: ...

    def receive_gradient(self, virtual_stage: int, microbatch: int) -> None: ...

    def offload(self, virtual_stage: int, microbatch: int) -> None: ...

    def reload(self, virtual_stage: int, microbatch: int) -> None: ...


def run_actions(steps: Iterable[Step], handlers: Handlers) -> None:
    """Execute `steps` in order. Every rank of the stage must call it with the same list."""
    table = handler_table(handlers)
    for step in steps:
        if isinstance(step, Pair):
            handlers.pair(step.forward[1:], step.backward_input[1:])
        else:
            table[step.kind](step)


def handler_table(handlers: Handlers) -> dict[Kind, Callable[[Action], None]]:
    """The handler of each kind; B is its two halves, one after the other."""

    def full_backward(action: Action) -> None:
        handlers.input_gradient(action.virtual_stage, action.microbatch)
        handlers.weight_gradient(action.virtual_stage, action.microbatch)

    methods = {
        Kind.F: handlers.forward,
        Kind.I: handlers.input_gradient,
        Kind.W: handlers.weight_gradient,
        Kind.SEND_F: handlers.send_activation,
        Kind.RECV_F: handlers.receive_activation,
        Kind.SEND_B: handlers.send_gradient,
        Kind.RECV_B: handlers.receive_gradient,
        Kind.OFFLOAD: handlers.offload,
        Kind.RELOAD: handlers.reload,
    }
    table: dict[Kind, Callable[[Action], None]] = {
        kind: _unpacked(method) for kind, method in methods.items()
    }
    table[Kind.B] = full_backward
    return table


def _unpacked(method: Callable[[int, int], None]) -> Callable[[Action], None]:
    return lambda action: method(action.virtual_stage, action.microbatch)
