"""Seconds and bytes of one layer, forward and backward: phases on two streams, memory between and
during them.

The estimate of a layer is a sum over its operations; the embedding and the head are treated as
layers of their own. All layers of a kind cost the same, so a model is two of these and two ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from k2train.architecture.embedding import (
    EMBEDDING_COLUMNS,
    embedding_grad_bytes,
    embedding_grad_kernels,
    embedding_ops,
)
from k2train.architecture.head import head_ops
from k2train.architecture.layer import Layer, LayerKind, layer_of
from k2train.architecture.work import Op, Workload, accumulation_bytes
from k2train.config.sections import ActivationsConfig
from k2train.estimate.activations import SavedTensor, saved_tensors
from k2train.estimate.work import Machine
from k2train.schedule.costs import Phase, Stream

LOGITS_CHUNK_ELEMENTS = 2**28
"""Logits that exist at once, 1638 tokens of K2's vocabulary. With an eighth of it K2's head would
take two and a half times as long, reading and writing its FP32 gradient sum for every 204
tokens."""


@dataclass(frozen=True)
class Exchange:
    """Seconds of a MoE layer's traffic between the ranks of an expert-parallel group
    (`estimate.exchange`), on its stream."""

    route: float
    """Until the host knows how many rows go where."""
    dispatch: float
    combine: float
    dispatch_back: float
    """The dispatch's backward: rows' gradients and weights' to their tokens."""
    combine_back: float
    """The combine's backward: tokens' gradients to the rows."""
    stream: Stream = Stream.EP
    """Of the moves; the route's wait is beside the main stream in any case."""

    @property
    def forward(self) -> tuple[list[Phase], list[Phase]]:
        """Before and after the experts."""
        before = [Phase("route", Stream.EP, self.route), self._phase("dispatch", self.dispatch)]
        return before, [self._phase("combine", self.combine)]

    @property
    def backward(self) -> tuple[list[Phase], list[Phase]]:
        """Before and after the experts; the route's step does nothing, it keeps the halves of a
        pair in time."""
        after = [self._phase("dispatch", self.dispatch_back), Phase("route", Stream.EP, 0.0)]
        return [self._phase("combine", self.combine_back)], after

    def _phase(self, name: str, seconds: float) -> Phase:
        return Phase(name, self.stream, seconds)


@dataclass(frozen=True)
class LayerCosts:
    """One layer, or one end of the model, for one microbatch on one rank."""

    forward: tuple[Phase, ...]
    backward_input: tuple[Phase, ...]
    weight_grad_seconds: float
    saved: tuple[SavedTensor, ...]
    forward_transient_bytes: int
    backward_transient_bytes: int
    put_off_transient_bytes: int
    """The backward's where weight gradients are put off: factors of the phases that are done wait
    beside it."""
    weight_queue_bytes: int
    forward_flops: float
    """Of the model: no recomputation, attention counted causally."""
    recompute_flops: float

    @property
    def left_bytes(self) -> int:
        """What its backward leaves where weight gradients are put off: factors, less what was
        saved."""
        return self.weight_queue_bytes - sum(tensor.stored_bytes for tensor in self.saved)


def transformer_layer(
    w: Workload, policies: ActivationsConfig, machine: Machine, exchange: Exchange, kind: LayerKind
) -> LayerCosts:
    """One layer."""
    saved = saved_tensors(w, policies, kind)
    layer, moe = layer_of(w.model, kind), kind == "moe"
    phases = layer.phases(w)
    forward = [_forward(machine, name, ops, saved) for name, ops in phases]
    backward = [_backward(machine, name, ops, saved) for name, ops in reversed(phases)]
    if moe:
        forward = _around_experts(forward, *exchange.forward)
        backward = _around_experts(backward, *exchange.backward)
    ops = [op for _, phase in phases for op in phase]
    transients = [_transient(w, layer, name, ops, saved) for name, ops in phases]
    return LayerCosts(
        tuple(forward),
        tuple(backward),
        machine.weight_grad(ops),
        saved,
        max(transient.forward_bytes for transient in transients),
        max(transient.backward_bytes for transient in transients),
        put_off_transient((transient.backward_bytes, transient.left_bytes) for transient in transients),
        _queue_bytes(ops),
        sum(op.flops for op in ops),
        sum(op.flops for op in _recomputed(ops, saved)),
    )


def embedding(w: Workload, machine: Machine) -> LayerCosts:
    """The look-up; its gradient is a weight gradient only."""
    output = w.tokens * w.model.hidden_size * w.element_bytes
    summed = w.tokens * min(w.model.hidden_size, EMBEDDING_COLUMNS) * accumulation_bytes(w.dtype)
    further = (embedding_grad_kernels(w) - 1) * machine.cluster.kernel_latency_seconds
    return LayerCosts(
        (Phase("embedding", Stream.COMPUTE, machine.forward(embedding_ops(w))),),
        (),
        machine.seconds(0.0, embedding_grad_bytes(w), "elementwise") + further,
        (),
        output,
        2 * summed,
        2 * summed,
        output,
        0.0,
        0.0,
    )


def head(w: Workload, machine: Machine, num_owners: int = 1) -> LayerCosts:
    """Final norm, logits and loss in chunks of tokens, with both gradients on the spot. num_owners:
    as in `head_ops`.

    Each chunk's logits become its loss and its gradients and are gone, so the forward does all
    three products and backward and weight gradient have next to nothing left. Every chunk passes
    over the weight and its FP32 gradient sum once more, which is why chunks must not be small. What
    is kept is the input and the gradient of the normed input.
    """
    stream = w.tokens * w.model.hidden_size
    chunk = min(w.tokens, logits_chunk_tokens(w))
    norm, logits, loss = head_ops(w, -(-w.tokens // chunk), num_owners)
    statistics = w.tokens * accumulation_bytes(w.dtype)
    kept = tuple(
        SavedTensor(name, "keep", stream, num_bytes, num_bytes)
        for name, num_bytes in (
            ("head_input", stream * w.element_bytes + statistics),
            ("head_gradient", stream * w.element_bytes),
        )
    )
    both_gradients = machine.backward_input([logits]) + machine.weight_grad([logits])
    return LayerCosts(
        (Phase("head", Stream.COMPUTE, machine.forward([norm, logits, loss]) + both_gradients),),
        (Phase("head", Stream.COMPUTE, machine.backward_input([norm])),),
        machine.weight_grad([norm]),
        kept,
        # A chunk's logits, their wide copy and its softmax; torch casts before it, but for FP16.
        chunk * w.model.vocab_size * (w.element_bytes + 2 * accumulation_bytes(w.dtype)),
        stream * w.element_bytes,
        stream * w.element_bytes,
        _queue_bytes([norm]),
        logits.flops,
        0.0,
    )


def logits_chunk_tokens(w: Workload) -> int:
    """Tokens whose logits exist at once."""
    return max(1, LOGITS_CHUNK_ELEMENTS // w.model.vocab_size)


def _around_experts(phases: Sequence[Phase], before: Sequence[Phase], after: Sequence[Phase]) -> list[Phase]:
    """What the ranks exchange before and after the experts."""
    placed: list[Phase] = []
    for phase in phases:
        placed += [*before, phase, *after] if phase.name == "experts" else [phase]
    return placed


def _forward(machine: Machine, name: str, ops: Sequence[Op], saved: Sequence[SavedTensor]) -> Phase:
    return Phase(name, Stream.COMPUTE, machine.forward(ops) + _casts(machine, ops, saved))


def _backward(machine: Machine, name: str, ops: Sequence[Op], saved: Sequence[SavedTensor]) -> Phase:
    rebuilt = machine.forward(_recomputed(ops, saved)) + _casts(machine, ops, saved)
    return Phase(name, Stream.COMPUTE, machine.backward_input(ops) + rebuilt)


def _recomputed(ops: Iterable[Op], saved: Iterable[SavedTensor]) -> list[Op]:
    """What runs again in the backward. Queries and keys that are rebuilt are rotated again."""
    dropped = {tensor.name for tensor in saved if tensor.policy == "recompute"}
    rotated = bool(dropped & {"query", "key_value"})
    return [op for op in ops if op.produces in dropped or (op.name == "rotary" and rotated)]


def _casts(machine: Machine, ops: Iterable[Op], saved: Iterable[SavedTensor]) -> float:
    """To FP8 in the forward, and back in the backward: read one form, write the other."""
    made = {op.produces for op in ops}
    if any(op.name == "experts_up" for op in ops):
        made.add("expert_input")
    return sum(
        machine.seconds(0.0, tensor.full_bytes + tensor.stored_bytes, "elementwise")
        for tensor in saved
        if tensor.is_fp8 and tensor.name in made
    )


@dataclass(frozen=True)
class _Transient:
    """Memory that a compute phase and the exchanges around it take while they run.

    As if nothing that a phase makes were freed before the phase ends: an upper bound.
    """

    forward_bytes: int
    backward_bytes: int
    left_bytes: int
    """What its backward leaves where weight gradients are put off: factors, less what the forward
    saved."""


def _transient(
    w: Workload, layer: Layer, phase: str, ops: Sequence[Op], saved: Sequence[SavedTensor]
) -> _Transient:
    """Of one phase. What is saved in another form than it is computed in is there in both."""
    names = layer.saved_in(w, phase)
    mine = [tensor for tensor in saved if tensor.name in names]
    unkept = sum(tensor.full_bytes - tensor.stored_bytes for tensor in mine)
    # Rows on their way, as many as two hops take: forward the experts' output and a hop of it, back
    # the gradients of the rows in both hops.
    moved = 2 * w.rows * w.model.hidden_size * w.element_bytes if phase == "experts" and w.ep > 1 else 0
    left = _queue_bytes(ops) - sum(tensor.stored_bytes for tensor in mine)
    gradients = w.element_bytes * layer.gradient_numbers(w, phase)
    return _Transient(unkept + moved, unkept + moved + gradients, left)


def put_off_transient(parts: Iterable[tuple[int, int]]) -> int:
    """The most that an input gradient takes beside what the forward saved, with weight gradients
    put off.

    parts: in the order of the forward, (bytes of its own backward, bytes that it leaves when it is
    done). The backward goes from the last to the first. A part that is done has let go of what it
    saved and left its products' factors.
    """
    most = left = 0
    for of_its_own, left_by_it in reversed(list(parts)):
        most = max(most, left + of_its_own)
        left += left_by_it
    return most


def _queue_bytes(ops: Iterable[Op]) -> int:
    """Inputs and output gradients of every product, an input that two products share once;
    gradients of norms' weights."""
    queued = [op.queued for op in ops if op.queued is not None]
    inputs = {name: num_bytes for name, num_bytes, _ in queued}
    return sum(inputs.values()) + sum(gradient for _, _, gradient in queued)
