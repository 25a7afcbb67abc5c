"""One microbatch through the phases of one virtual stage, as generators that pause where something
else may run.

A pause comes after each compute phase and between the start and the finish of each communication
phase. Driving one generator to its end is a plain forward or backward; driving two in the order of
`schedule.pair_order` is a PAIR, in which one's all-to-all is under way while the other computes (K2
report, Figure 7).

Within a forward the host waits for the device in one place, the finish of a MoE layer's route. In a
pair the other half's next compute phase has been issued by then; a plain forward has nothing to
issue in between.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch

from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Results
from k2train.model.phase import CommunicationPhase, Phase


def forward_steps(
    phases: Sequence[Phase], inputs: Results, context: MicrobatchContext, records: list[Any]
) -> Generator[None, None, Results]:
    """Forward through `phases`; appends each one's record and returns the outputs of the last.

    A compute phase's event is recorded at its end, before anything else is given to the main
    stream.
    """
    main = context.device.current
    for phase in phases:
        if isinstance(phase, CommunicationPhase):
            with torch.no_grad():
                started = phase.start_forward(inputs, context)
            yield
            with torch.no_grad():
                inputs, record = phase.finish_forward(started, context)
        else:
            outputs, record = phase.forward(inputs.on(main), context)
            inputs = Results(outputs, main.record())
            yield
        records.append(record)
    return inputs


def backward_steps(
    phases: Sequence[Phase], grads: Results, context: MicrobatchContext, records: list[Any]
) -> Generator[None, None, Results]:
    """Backward through `phases`, last first; consumes `records` and returns the gradients of the
    first one's inputs."""
    main = context.device.current
    for phase in reversed(phases):
        record = records.pop()
        if isinstance(phase, CommunicationPhase):
            with torch.no_grad():
                started = phase.start_backward(record, grads, context)
            yield
            with torch.no_grad():
                grads = phase.finish_backward(started, context)
        else:
            grads = Results(phase.backward(record, grads.on(main), context), main.record())
            yield
    return grads


def finish(steps: Generator[None, None, Any]) -> Any:
    """Drive a generator to its end without pausing; its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def alternate(
    forward: Generator[None, None, Results], backward: Generator[None, None, Results], order: Sequence[int]
) -> tuple[Results, Results]:
    """Drive both to their ends; their return values. order: whose next phase is issued, 0 for the
    forward; all of both."""
    steps = (forward, backward)
    for chain in order:
        next(steps[chain])
    return finish(forward), finish(backward)
