"""What waits for what when a stage's list runs: exchanges and messages for their own inputs, and
nobody else for them.

A device whose streams keep account: everything issued to a stream comes after what the stream was
given before and after the events it waited for. The operations themselves run at once, on the CPU.

Letters: T tokens, K experts per token, D features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from k2train.device.cpu import CpuDevice, CpuReading
from k2train.device.protocol import Event, Reading, Stream
from k2train.model.context import MicrobatchContext
from k2train.model.layers import CombinePhase, DispatchPhase, RoutePhase
from k2train.ops.weight_grad import PlainGradients
from k2train.parallel.communicator import Communicator, Work, World
from k2train.parallel.dispatcher import AllToAllDispatcher
from k2train.parallel.relay_dispatcher import RelayDispatcher
from k2train.parallel.side_stream import SideStream
from k2train.parallel.threads import run_threads
from k2train.runtime.executor import run_actions
from k2train.runtime.stage import PipelineStage, Route, StepInputs
from k2train.schedule.actions import parse_line

TOKENS, FEATURES = 3, 2


class SeenEvent(Event):
    """What is done when it has come."""

    def __init__(self, done: frozenset[str]) -> None:
        self.done = done


class SeenStream(Stream):
    """Keeps the names of all that what is issued next comes after."""

    def __init__(self, name: str, device: SeenDevice) -> None:
        self.name, self._device, self.done = name, device, frozenset[str]()

    def record(self) -> SeenEvent:
        return SeenEvent(self.done)

    def wait(self, *events: Event | None) -> None:
        for event in events:
            if event is not None:
                assert isinstance(event, SeenEvent)
                self.done |= event.done

    @contextlib.contextmanager
    def issue(self) -> Iterator[None]:
        before, self._device.on = self._device.on, self
        yield
        self._device.on = before

    def uses(self, *tensors: torch.Tensor) -> None:
        pass


class SeenReading(CpuReading):
    """Says when the host waits for it."""

    def __init__(self, numbers: list[float], device: SeenDevice) -> None:
        super().__init__(numbers)
        self._device = device

    def wait(self) -> list[float]:
        self._device.log.append("the host waits")
        return super().wait()


class SeenDevice(CpuDevice):
    """log: what was issued, in the host's order; after: for each of it, all that it waits for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.main = self.on = SeenStream("main", self)
        self.log: list[str] = []
        self.after: dict[str, frozenset[str]] = {}

    @property
    def current(self) -> Any:
        return self.on

    def stream(self, name: str, priority: str = "normal") -> Any:
        return SeenStream(name, self)

    def start_read(self, tensor: torch.Tensor, what: str) -> Reading:
        return SeenReading(tensor.flatten().tolist(), self)

    def do(self, what: str) -> None:
        """Issue something to the current stream."""
        self.log.append(what)
        self.after[what] = self.after.get(what, frozenset()) | self.on.done
        self.on.done |= {what}


class SeenGroup(Communicator):
    """A group of one whose collectives are named for the phase that starts them."""

    name, rank, size = "ep", 0, 1

    def __init__(self, group: Communicator, device: SeenDevice) -> None:
        self._group, self._device, self.label = group, device, ""

    def start_all_to_all(self, *arguments: Any) -> Work:
        self._device.do(self.label)
        return self._group.start_all_to_all(*arguments)

    def start_all_gather(self, *arguments: Any) -> Work:
        self._device.do(self.label)
        return self._group.start_all_gather(*arguments)


class Labelled:
    """A communication phase that tells its group who is at work."""

    group: SeenGroup

    def start_forward(self, inputs: Any, context: MicrobatchContext) -> Any:
        self.group.label = f"F{context.key[0]}.{context.key[1]} {self.name.split('.')[1]}"
        return super().start_forward(inputs, context)

    def start_backward(self, record: Any, grads: Any, context: MicrobatchContext) -> Any:
        self.group.label = f"I{context.key[0]}.{context.key[1]} {self.name.split('.')[1]}"
        return super().start_backward(record, grads, context)


class LabelledRoute(Labelled, RoutePhase):
    pass


class LabelledDispatch(Labelled, DispatchPhase):
    pass


class LabelledCombine(Labelled, CombinePhase):
    pass


class Compute:
    """A compute phase by its name: attention with a router, experts, or the end of the model."""

    stream = "compute"

    def __init__(self, name: str) -> None:
        self.name = name

    def forward(self, inputs: Any, context: MicrobatchContext) -> Any:
        context.device.do(f"F{context.key[0]}.{context.key[1]} {self.name}")
        if self.name == "attention":
            (x_TD,) = inputs
            experts_TK = torch.zeros(TOKENS, 1, dtype=torch.int64)
            return (x_TD, x_TD, torch.ones(TOKENS, 1), experts_TK, torch.tensor([TOKENS])), None
        return ((inputs[0], inputs[2]) if self.name == "experts" else inputs), None

    def backward(self, record: None, grads: Any, context: MicrobatchContext) -> Any:
        context.device.do(f"I{context.key[0]}.{context.key[1]} {self.name}")
        if self.name == "attention":
            return (grads[0] + grads[1],)
        if self.name == "end":
            return (torch.ones(TOKENS, FEATURES),)
        assert context.weight_grads is not None
        context.weight_grads.put(context.key, WeightGradient(context))
        return grads[0], grads[0].clone(), grads[1], torch.ones(TOKENS), None


class WeightGradient:
    """Put off until its W."""

    tensors: tuple[torch.Tensor, ...] = ()

    def __init__(self, context: MicrobatchContext) -> None:
        self._context = context

    def accumulate(self, sink: Any) -> None:
        self._context.device.do(f"W{self._context.key[0]}.{self._context.key[1]}")


class Wire:
    """Messages to and from another stage, which come after what the current stream has been given
    and waited for."""

    def __init__(self, device: SeenDevice) -> None:
        self._device = device

    def send(self, tensor: torch.Tensor, stage: int) -> None:
        self._device.do(f"message {len([w for w in self._device.log if w.startswith('message')])}")

    def receive(self, num_rows: int, stage: int) -> Any:
        wire = self

        class Message:
            def wait(self) -> torch.Tensor:
                wire._device.do("a message has come")
                return torch.ones(TOKENS, FEATURES)

        return Message()

    def finish(self) -> None:
        pass


def moe_layer(layer: int, dispatcher: Any, group: SeenGroup) -> list[Any]:
    found: list[Any] = [Compute("attention"), LabelledRoute(layer, dispatcher)]
    found += [LabelledDispatch(layer, dispatcher), Compute("experts"), LabelledCombine(layer, dispatcher)]
    for phase in found:
        phase.group = group
    return found


class Part:
    """A virtual stage made of the phases it is given."""

    def __init__(self, phases: Sequence[Any]) -> None:
        self.phases = phases


def run(line: str, dispatch: str, routes: dict[int, Route]) -> SeenDevice:
    """A stage's list on virtual stages of one MoE layer each; the last one also ends the model."""

    def on_rank(world: World) -> SeenDevice:
        device = SeenDevice()
        group = SeenGroup(world.group("ep", [0]), device)
        side = SideStream(device)
        if dispatch == "per_expert":
            dispatcher: Any = AllToAllDispatcher(group, 1, side)
        else:
            dispatcher = RelayDispatcher(group, group, None, 1, side)
        models = {v: Part(moe_layer(v, dispatcher, group)) for v in routes}
        for v, route in routes.items():
            if route.next is None:
                models[v].phases.append(Compute("end"))
        stage = PipelineStage(models, routes, Wire(device), PlainGradients(), device)

        def context(v: int, m: int) -> MicrobatchContext:
            return MicrobatchContext(1, PlainGradients(), weight_grads=stage.queue, key=(v, m), device=device)

        inputs = StepInputs(lambda m: torch.ones(TOKENS, FEATURES), TOKENS, context, 2)
        with stage.step(inputs):
            run_actions(parse_line(line), stage)
        return device

    return run_threads(1, on_rank)[0]


HERE = {0: Route(0, None, 1, 0, 0), 1: Route(0, 0, None, 0, 0)}
"""Two virtual stages on one rank."""
PAIRS = "F0.0 F1.0 F0.1+I1.0 W1.0 F1.1+I0.0 W0.0 I1.1 W1.1 I0.1 W0.1"
dispatches = pytest.mark.parametrize("dispatch", ["per_expert", "per_rank"])


@dispatches
def test_a_backwards_first_all_to_all_waits_for_its_gradient_and_not_for_the_weight_gradient_before_it(
    dispatch: str,
) -> None:
    after = run(PAIRS, dispatch, HERE).after
    assert "I1.0 attention" in after["I0.0 combine"]
    assert "W1.0" not in after["I0.0 combine"]
    # All the more: in the pair it is issued behind the forward's attention, which it does not need
    # either.
    assert "F1.1 attention" not in after["I0.0 combine"]


@dispatches
def test_a_forwards_last_all_to_all_is_waited_for_by_who_reads_it_and_not_by_the_weight_gradient(
    dispatch: str,
) -> None:
    after = run(PAIRS, dispatch, HERE).after
    assert "F0.1 combine" not in after["W1.0"]
    assert "F0.1 combine" in after["F1.1 attention"]


@dispatches
def test_each_exchange_waits_for_the_phase_that_made_its_input(dispatch: str) -> None:
    after = run(PAIRS, dispatch, HERE).after
    for exchange, maker, later in (
        ("F1.1 route", "F1.1 attention", "I0.0 experts"),
        ("F1.1 dispatch", "F1.1 attention", "I0.0 experts"),
        ("F1.1 combine", "F1.1 experts", "I0.0 attention"),
        ("I0.0 dispatch", "I0.0 experts", "F1.1 experts"),
    ):
        assert maker in after[exchange], exchange
        assert later not in after[exchange], exchange


@dispatches
def test_the_host_waits_for_a_route_when_the_partners_next_phase_has_been_issued(dispatch: str) -> None:
    log = run(PAIRS, dispatch, HERE).log
    start, waits = log.index("F1.1 route"), log.index("the host waits", log.index("F1.1 route"))
    assert "I0.0 experts" in log[start:waits]
    # A forward alone has nothing to issue in between.
    assert log[log.index("F0.0 route") + 1] == "the host waits"


@dispatches
def test_a_message_from_another_stage_is_waited_for_by_its_own_phase_alone(dispatch: str) -> None:
    """Stage 0 of two: gradients come from stage 1. A weight gradient stands between the receive and
    its use."""
    line = "F0.0 SEND_F0.0 F0.1 SEND_F0.1 RECV_B0.0 I0.0 RECV_B0.1 W0.0 I0.1 W0.1"
    device = run(line, dispatch, {0: Route(0, None, 1, 0, 1)})
    assert "a message has come" in device.after["I0.1 combine"]
    assert "W0.0" not in device.after["I0.1 combine"]
    assert "a message has come" not in device.after["F0.1 attention"]


@dispatches
def test_a_pairs_forward_is_sent_without_waiting_for_its_backward(dispatch: str) -> None:
    line = "F0.0 SEND_F0.0 RECV_B0.0 F0.1+I0.0 SEND_F0.1 W0.0 RECV_B0.1 I0.1 W0.1"
    after = run(line, dispatch, {0: Route(0, None, 1, 0, 1)}).after
    assert "F0.1 combine" in after["message 1"]
    assert "I0.0 attention" not in after["message 1"]
