"""The handlers of one rank: its virtual stages, what is under way in them, and the messages to its
neighbours.

A microbatch on a virtual stage goes through these hands, each named by (virtual stage, microbatch):

    inputs     activations that have arrived: local ones as results, remote ones as a receive to be
               waited for
    records    what the phases keep from forward to backward, with the microbatch's context
    outputs    activations to be sent        gradients, received_gradients    the same on the way
               back

All of them must be empty at the end of a step, and `finish_step` proves it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from k2train.device.protocol import Device
from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Results
from k2train.model.phase import Phase
from k2train.ops.weight_grad import GradientSink, Key, WeightGradQueue
from k2train.runtime.pace import Pace
from k2train.runtime.passes import alternate, backward_steps, finish, forward_steps
from k2train.runtime.routes import Route
from k2train.schedule.overlap import pair_order


class Arrival(Protocol):
    """A message that may still be under way, and the memory it comes into."""

    @property
    def tensor(self) -> torch.Tensor: ...

    def wait(self) -> torch.Tensor: ...


class Transport(Protocol):
    """Messages between pipeline stages. Between two stages they arrive in the order they were sent
    in."""

    def send(self, tensor: torch.Tensor, stage: int) -> None: ...

    def receive(self, num_rows: int, stage: int) -> Arrival:
        """Post the receive of a (num_rows, hidden) tensor."""
        ...

    def finish(self) -> None:
        """Wait until everything sent has left."""
        ...

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is kept because it may not have left."""
        ...

    def abandon(self) -> None:
        """Let go of what an interrupted step has sent, without waiting for it."""
        ...


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What one pass over an action list works on.

    tokens(microbatch) gives its (B, S) ids and is called where the model begins. num_rows is B * S,
    the same for every microbatch. make_context(virtual_stage, microbatch) gives what its phases may
    touch. before_forward(virtual_stage) is called ahead of each forward,
    weight_gradients_done(virtual_stage) once its last weight gradient is in, which needs
    num_microbatches. wait(arrival) waits for a message; a recorder puts its own here.
    """

    tokens: Callable[[int], torch.Tensor]
    num_rows: int
    make_context: Callable[[int, int], MicrobatchContext]
    num_microbatches: int
    before_forward: Callable[[int], None] = lambda virtual_stage: None
    weight_gradients_done: Callable[[int], None] = lambda virtual_stage: None
    wait: Callable[[Arrival], torch.Tensor] = lambda arrival: arrival.wait()


class Phased(Protocol):
    """A virtual stage's part of a model: all that running it needs are its phases."""

    @property
    def phases(self) -> Sequence[Phase]: ...


class PipelineStage:
    """Implements executor.Handlers for the virtual stages of one rank."""

    def __init__(
        self,
        models: Mapping[int, Phased],
        routes: Mapping[int, Route],
        transport: Transport | None,
        gradients: GradientSink | None,
        device: Device,
    ) -> None:
        """transport may be None where all virtual stages live here; gradients is None in
        evaluation.

        Messages have streams of their own. A phase then waits for its own message, and a message
        for the result it carries, whatever else the main stream has been given by then.
        """
        self.models, self.routes, self.transport, self.gradients = models, routes, transport, gradients
        self._arriving, self._leaving = device.stream("arriving messages"), device.stream("leaving messages")
        self.queue = WeightGradQueue()
        self._pace = Pace(device)
        self._step: StepInputs | None = None
        self._weight_gradients: collections.Counter[int] = collections.Counter()
        self._inputs: dict[Key, Arrival | Results] = {}
        self._outputs: dict[Key, Results] = {}
        self._records: dict[Key, tuple[list[Any], MicrobatchContext]] = {}
        self._arrived_gradients: dict[Key, Arrival | Results] = {}
        self._gradients: dict[Key, Results] = {}

    @contextlib.contextmanager
    def step(self, inputs: StepInputs) -> Iterator[None]:
        """A pass over an action list, from `begin_step` to `finish_step`, or to `abandon_step`
        where it fails."""
        self.begin_step(inputs)
        try:
            yield
            self.finish_step()
        except BaseException:
            self.abandon_step()
            raise

    def begin_step(self, step: StepInputs) -> None:
        """Take up the inputs of a pass; `finish_step` or `abandon_step` ends it."""
        self._step = step
        self._weight_gradients.clear()

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is under way between two actions: messages, and what weight gradients wait for; for
        whoever counts storages. What phases have saved is the store's."""
        for messages in (self._inputs, self._outputs, self._arrived_gradients, self._gradients):
            for message in messages.values():
                held = message.tensors if isinstance(message, Results) else (message.tensor,)
                yield from (tensor for tensor in held if tensor is not None)
        yield from self.queue.tensors()
        if self.transport is not None:
            yield from self.transport.tensors()

    def finish_step(self) -> None:
        """Wait for the sends and prove that nothing is left under way."""
        if self.transport is not None:
            self.transport.finish()
        left = {name: list(held) for name, held in self._held().items() if held}
        assert not left, f"left under way at the end of a step: {left}"
        assert self.queue.empty, f"weight gradients never taken: {self.queue.keys()}"

    def abandon_step(self) -> None:
        """Forget an interrupted step."""
        for _, context in self._records.values():
            context.saved.drop()
        for held in self._held().values():
            held.clear()
        if self.transport is not None:
            self.transport.abandon()
        self.queue.clear()

    def forward(self, virtual_stage: int, microbatch: int) -> None:
        key = (virtual_stage, microbatch)
        with self._pace.step():
            self._forward_done(key, finish(self._forward_steps(key)))

    def input_gradient(self, virtual_stage: int, microbatch: int) -> None:
        key = (virtual_stage, microbatch)
        with self._pace.step():
            self._backward_done(key, finish(self._backward_steps(key)))

    def weight_gradient(self, virtual_stage: int, microbatch: int) -> None:
        assert self.gradients is not None
        with self._pace.step():
            self.queue.drain((virtual_stage, microbatch), self.gradients)
        step = self._inputs_of_step()
        self._weight_gradients[virtual_stage] += 1
        if self._weight_gradients[virtual_stage] == step.num_microbatches:
            step.weight_gradients_done(virtual_stage)

    def pair(self, forward: Key, backward: Key) -> None:
        order = pair_order(*(len(self.models[key[0]].phases) for key in (forward, backward)))
        with self._pace.step():
            outputs, grads = alternate(self._forward_steps(forward), self._backward_steps(backward), order)
            self._forward_done(forward, outputs)
            self._backward_done(backward, grads)

    def send_activation(self, virtual_stage: int, microbatch: int) -> None:
        results = self._outputs.pop((virtual_stage, microbatch))
        self._send(results, self.routes[virtual_stage].next_stage)

    def receive_activation(self, virtual_stage: int, microbatch: int) -> None:
        peer = self.routes[virtual_stage].previous_stage
        rows = self._inputs_of_step().num_rows
        self._inputs[virtual_stage, microbatch] = self._wire().receive(rows, peer)

    def send_gradient(self, virtual_stage: int, microbatch: int) -> None:
        results = self._gradients.pop((virtual_stage, microbatch))
        self._send(results, self.routes[virtual_stage].previous_stage)

    def receive_gradient(self, virtual_stage: int, microbatch: int) -> None:
        peer = self.routes[virtual_stage].next_stage
        rows = self._inputs_of_step().num_rows
        self._arrived_gradients[virtual_stage, microbatch] = self._wire().receive(rows, peer)

    def offload(self, virtual_stage: int, microbatch: int) -> None:
        self._records[virtual_stage, microbatch][1].saved.offload()

    def reload(self, virtual_stage: int, microbatch: int) -> None:
        self._records[virtual_stage, microbatch][1].saved.reload()

    def _forward_steps(self, key: Key) -> Any:
        virtual_stage, microbatch = key
        step = self._inputs_of_step()
        step.before_forward(virtual_stage)
        context = step.make_context(virtual_stage, microbatch)
        records: list[Any] = []
        self._records[key] = (records, context)
        return forward_steps(self.models[virtual_stage].phases, self._take_inputs(key), context, records)

    def _send(self, results: Results, stage: int) -> None:
        with self._leaving.issue():
            (tensor,) = results.on(self._leaving)
            self._wire().send(tensor, stage)

    def _take_inputs(self, key: Key) -> Results:
        if self.routes[key[0]].previous is None:
            return Results((self._inputs_of_step().tokens(key[1]),))
        return self._arrived(self._inputs.pop(key))

    def _arrived(self, arrival: Arrival | Results) -> Results:
        """A message and the event at which it is there; the main stream does not wait for it
        here."""
        if isinstance(arrival, Results):
            return arrival
        with self._arriving.issue():
            tensor = self._inputs_of_step().wait(arrival)
        return Results((tensor,), self._arriving.record())

    def _forward_done(self, key: Key, outputs: Results) -> None:
        route = self.routes[key[0]]
        self._records[key][1].saved.forward_done()
        if self.gradients is None:
            del self._records[key]
        if route.next is None:
            return
        if route.next_is_here:
            self._inputs[route.next, key[1]] = outputs
        else:
            self._outputs[key] = outputs

    def _backward_steps(self, key: Key) -> Any:
        records, context = self._records.pop(key)
        is_last = self.routes[key[0]].next is None
        gradient = Results((None,)) if is_last else self._arrived(self._arrived_gradients.pop(key))
        return backward_steps(self.models[key[0]].phases, gradient, context, records)

    def _backward_done(self, key: Key, grads: Results) -> None:
        route = self.routes[key[0]]
        if route.previous is None:
            return
        assert grads.tensors[0] is not None
        if route.previous_is_here:
            self._arrived_gradients[route.previous, key[1]] = grads
        else:
            self._gradients[key] = grads

    def _wire(self) -> Transport:
        assert self.transport is not None, "a schedule with messages needs a transport"
        return self.transport

    def _inputs_of_step(self) -> StepInputs:
        assert self._step is not None, "begin_step comes first"
        return self._step

    def _held(self) -> dict[str, dict[Key, Any]]:
        return {
            "inputs": self._inputs,
            "outputs": self._outputs,
            "records": self._records,
            "received gradients": self._arrived_gradients,
            "gradients": self._gradients,
        }
