"""Phases: the pieces a layer is cut into, each with its own forward and backward.

The autograd graph ends at a phase's border. A compute phase's graph is entered through a node that
holds no tensor and left through edges that hold none, so between forward and backward nothing is
alive but what operations saved on purpose. A communication phase is linear and has no graph at all;
it can be started and finished separately, so that the runtime puts another microbatch's compute
between the two (K2 report, section 2.4.2).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Results
from k2train.model.pieces import Piece
from k2train.ops.weight_grad import WeightGradSlot

Tensors = tuple[torch.Tensor, ...]
Grads = tuple[torch.Tensor | None, ...]


class Phase(Protocol):
    """A step of the model: `forward` and `backward` of one microbatch, in the order the schedule
    says."""

    @property
    def name(self) -> str: ...

    @property
    def stream(self) -> Literal["compute", "communication"]: ...

    def forward(self, inputs: Tensors, context: MicrobatchContext) -> tuple[Tensors, Any]:
        """Outputs, cut from any graph, and the record its backward needs (None in evaluation)."""
        ...

    def backward(self, record: Any, grad_outputs: Grads, context: MicrobatchContext) -> Grads:
        """Gradients of the inputs (None for one without); parameters' gradients go to the
        context."""
        ...


@dataclasses.dataclass
class ComputeRecord:
    """The ends of a compute phase's graph."""

    inputs: list[GradientEdge | None]
    outputs: list[GradientEdge | None]


class ComputePhase(abc.ABC):
    """A phase that is a plain differentiable function of its inputs.

    Autograd is asked for the gradients of the inputs alone. Those of the weights are put into the
    slot by the operations that have weights, because autograd would round them to the weights'
    type, microbatch by microbatch.
    """

    stream: Literal["compute"] = "compute"

    def __init__(self, name: str, layer: int | None = None, otherwise: str | None = None) -> None:
        """layer: whose activations it saves, None for the ends. otherwise: the name of those it
        gives no name."""
        self.name, self.layer, self.otherwise = name, layer, otherwise

    @abc.abstractmethod
    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        """The phase's mathematics, in plain autograd. Where a slot is given, every weight's
        gradient must go there."""

    @abc.abstractmethod
    def pieces(self) -> list[Piece]:
        """The named tensors it holds."""

    def forward(self, inputs: Tensors, context: MicrobatchContext) -> tuple[Tensors, ComputeRecord | None]:
        if not context.training:
            with torch.no_grad():
                return self.compute(inputs, context, None), None
        slot = context.slot()
        with torch.enable_grad(), context.saved.saving(self.layer, self.otherwise):
            entered = _enter(inputs)
            outputs = self.compute(entered, context, slot)
        record = ComputeRecord([_entry(t) for t in entered], [_edge(t) for t in outputs])
        return tuple(t.detach() for t in outputs), record

    def backward(self, record: ComputeRecord, grad_outputs: Grads, context: MicrobatchContext) -> Grads:
        pairs = zip(record.outputs, grad_outputs, strict=True)
        roots = [(edge, grad) for edge, grad in pairs if edge is not None and grad is not None]
        found = iter(_grad(roots, [edge for edge in record.inputs if edge is not None]))
        return tuple(None if edge is None else next(found) for edge in record.inputs)


def _grad(roots: list[tuple[GradientEdge, torch.Tensor]], wanted: list[GradientEdge]) -> Grads:
    if not roots or not wanted:
        return (None,) * len(wanted)
    edges, gradients = zip(*roots, strict=True)
    return torch.autograd.grad(edges, wanted, gradients, allow_unused=True)


def _edge(tensor: torch.Tensor) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _entry(tensor: torch.Tensor) -> GradientEdge | None:
    """The edge of a tensor that _Enter made. The graph behind it holds its node, so the edge need
    not."""
    node = tensor.grad_fn
    return None if node is None else GradientEdge(node, tensor.output_nr)


class _Enter(torch.autograd.Function):
    """The tensors unchanged, as the outputs of one node. A leaf's node would keep the tensor alive;
    this one does not."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * (1 + len(grads))


def _enter(inputs: Tensors) -> Tensors:
    floating = [t.detach() for t in inputs if t.is_floating_point()]
    if not floating:
        return inputs
    anchor = torch.empty(0, device=floating[0].device, requires_grad=True)
    entered = iter(_Enter.apply(anchor, *floating))
    return tuple(next(entered) if t.is_floating_point() else t for t in inputs)


@dataclasses.dataclass(frozen=True)
class Started:
    """A communication phase between its start and its finish: what is under way, and what waits
    beside it."""

    pending: Any
    rest: tuple[Any, ...] = ()


class CommunicationPhase(abc.ABC):
    """A linear phase that mostly waits. Its whole forward is its start followed by its finish.

    Inputs and results carry the event at which they are there (`Results.ready`): an exchange waits
    for its own inputs, not for all that the main stream was given before it, and nobody waits for
    an exchange but who computes with its results.
    """

    stream: Literal["communication"] = "communication"

    def __init__(self, name: str) -> None:
        self.name = name

    @abc.abstractmethod
    def start_forward(self, inputs: Results, context: MicrobatchContext) -> Started: ...

    @abc.abstractmethod
    def finish_forward(self, started: Started, context: MicrobatchContext) -> tuple[Results, Any]: ...

    @abc.abstractmethod
    def start_backward(self, record: Any, grad_outputs: Results, context: MicrobatchContext) -> Started: ...

    @abc.abstractmethod
    def finish_backward(self, started: Started, context: MicrobatchContext) -> Results: ...

    def forward(self, inputs: Tensors, context: MicrobatchContext) -> tuple[Tensors, Any]:
        with torch.no_grad():
            results, record = self.finish_forward(self.start_forward(Results(inputs), context), context)
        return results.on(context.device.current), record

    def backward(self, record: Any, grad_outputs: Grads, context: MicrobatchContext) -> Grads:
        with torch.no_grad():
            started = self.start_backward(record, Results(grad_outputs), context)
            return self.finish_backward(started, context).on(context.device.current)
