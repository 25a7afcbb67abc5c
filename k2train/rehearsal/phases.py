"""A model whose phases say where the program is; to the runtime they are phases like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Results
from k2train.model.phase import CommunicationPhase, Grads, Phase, Started, Tensors
from k2train.model.pieces import Piece
from k2train.rehearsal.observer import Observer


class WatchedModel:
    """Implements runtime.stage.Phased."""

    def __init__(self, phases: Sequence[Phase], observer: Observer) -> None:
        self.phases = [watched(phase, observer) for phase in phases]


def watched(phase: Phase, observer: Observer) -> Phase:
    """The phase, with the observer told of it."""
    if isinstance(phase, CommunicationPhase):
        return WatchedCommunication(phase, observer)
    return WatchedCompute(phase, observer)


class WatchedCompute:
    """Implements model.phase.Phase."""

    stream: Literal["compute"] = "compute"

    def __init__(self, phase: Phase, observer: Observer) -> None:
        self.name, self._phase, self._observer = phase.name, phase, observer

    def forward(self, inputs: Tensors, context: MicrobatchContext) -> tuple[Tensors, Any]:
        with self._observer.at(f"F/{kind_of(self.name)}"):
            return self._phase.forward(inputs, context)

    def backward(self, record: Any, grad_outputs: Grads, context: MicrobatchContext) -> Grads:
        with self._observer.at(f"I/{kind_of(self.name)}"):
            return self._phase.backward(record, grad_outputs, context)


class WatchedCommunication(CommunicationPhase):
    """The same for a phase that is started and finished."""

    def __init__(self, phase: CommunicationPhase, observer: Observer) -> None:
        super().__init__(phase.name)
        self._phase, self._observer = phase, observer

    def pieces(self) -> list[Piece]:
        return []

    def start_forward(self, inputs: Results, context: MicrobatchContext) -> Started:
        with self._observer.at(f"F/{kind_of(self.name)}"):
            return self._phase.start_forward(inputs, context)

    def finish_forward(self, started: Started, context: MicrobatchContext) -> tuple[Results, Any]:
        with self._observer.at(f"F/{kind_of(self.name)}"):
            return self._phase.finish_forward(started, context)

    def start_backward(self, record: Any, grad_outputs: Results, context: MicrobatchContext) -> Started:
        with self._observer.at(f"I/{kind_of(self.name)}"):
            return self._phase.start_backward(record, grad_outputs, context)

    def finish_backward(self, started: Started, context: MicrobatchContext) -> Results:
        with self._observer.at(f"I/{kind_of(self.name)}"):
            return self._phase.finish_backward(started, context)


def kind_of(name: str) -> str:
    """A phase's name without its layer: layer3.attention is attention."""
    return name.rsplit(".", 1)[-1]
