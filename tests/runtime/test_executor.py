"""Actions go to their handlers in the order of the list; a pair's phases alternate; nothing may be
left under way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from k2train.device.cpu import CpuDevice
from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Results
from k2train.model.phase import CommunicationPhase, Started
from k2train.ops.weight_grad import Key, PlainGradients
from k2train.parallel.channels import build_channels
from k2train.parallel.communicator import World
from k2train.parallel.pipeline import PipelineTransport
from k2train.parallel.threads import run_threads
from k2train.runtime.executor import run_actions
from k2train.runtime.passes import alternate, backward_steps, finish, forward_steps
from k2train.runtime.routes import build_routes
from k2train.runtime.stage import PipelineStage, Route, StepInputs
from k2train.schedule import Schedule, ScheduleSpec, build_schedule, validate
from k2train.schedule.actions import parse_line
from k2train.schedule.messages import Messages, plan_messages
from k2train.schedule.overlap import pair_order


class Recording:
    """Handlers that note what they are asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, *arguments))


def test_every_kind_goes_to_its_handler_and_a_backward_is_its_two_halves() -> None:
    handlers = Recording()
    line = "RECV_F1.0 F1.0 SEND_F1.0 RECV_B1.0 B1.0 SEND_B1.0 F1.2+I3.1 I1.4 W1.4 OFFLOAD1.5 RELOAD1.5"
    run_actions(parse_line(line), handlers)
    assert handlers.calls == [
        ("receive_activation", 1, 0),
        ("forward", 1, 0),
        ("send_activation", 1, 0),
        ("receive_gradient", 1, 0),
        ("input_gradient", 1, 0),
        ("weight_gradient", 1, 0),
        ("send_gradient", 1, 0),
        ("pair", (1, 2), (3, 1)),
        ("input_gradient", 1, 4),
        ("weight_gradient", 1, 4),
        ("offload", 1, 5),
        ("reload", 1, 5),
    ]


class Compute:
    """A compute phase that notes its calls and adds one."""

    stream = "compute"

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def forward(self, inputs: Any, context: Any) -> Any:
        self.log.append(f"{self.name} forward")
        return (inputs[0] + 1,), self.name

    def backward(self, record: Any, grads: Any, context: Any) -> Any:
        assert record == self.name
        self.log.append(f"{self.name} backward")
        return (grads[0] * 2,)


class Exchange(CommunicationPhase):
    """A communication phase that notes its starts and finishes and adds ten."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(name)
        self.log = log

    def start_forward(self, inputs: Any, context: Any) -> Started:
        self.log.append(f"{self.name} starts")
        return Started(inputs)

    def finish_forward(self, started: Started, context: Any) -> Any:
        self.log.append(f"{self.name} arrives")
        return Results((started.pending.tensors[0] + 10,)), self.name

    def start_backward(self, record: Any, grads: Any, context: Any) -> Started:
        assert record == self.name
        self.log.append(f"{self.name} starts back")
        return Started(grads)

    def finish_backward(self, started: Started, context: Any) -> Any:
        self.log.append(f"{self.name} is back")
        return Results((started.pending.tensors[0] * 3,))


def phases(name: str, log: list[str]) -> list[Any]:
    return [Compute(f"{name}.a", log), Exchange(f"{name}.b", log), Compute(f"{name}.c", log)]


CONTEXT = MicrobatchContext(num_sequences=1)
CPU = CpuDevice(torch.device("cpu"))


def test_a_pair_computes_one_microbatch_while_the_others_rows_are_under_way() -> None:
    log: list[str] = []
    records: list[Any] = []
    finish(forward_steps(phases("y", log), Results((torch.zeros(1),)), CONTEXT, records))
    log.clear()
    forward, backward = alternate(
        forward_steps(phases("x", log), Results((torch.zeros(1),)), CONTEXT, []),
        backward_steps(phases("y", log), Results((torch.ones(1),)), CONTEXT, records),
        pair_order(3, 3),
    )
    assert log == [
        "x.a forward",
        "y.c backward",
        "x.b starts",
        "y.b starts back",
        "x.b arrives",
        "x.c forward",
        "y.b is back",
        "y.a backward",
    ]
    assert (forward.tensors[0].item(), backward.tensors[0].item(), records) == (12, 12, [])


def test_a_pair_of_unequal_lengths_runs_both_to_their_ends() -> None:
    log: list[str] = []
    records: list[Any] = []
    finish(forward_steps(phases("y", log), Results((torch.zeros(1),)), CONTEXT, records))
    forward, backward = alternate(
        forward_steps([Compute("x", log)], Results((torch.zeros(1),)), CONTEXT, []),
        backward_steps(phases("y", log), Results((torch.ones(1),)), CONTEXT, records),
        pair_order(1, 3),
    )
    assert (forward.tensors[0].item(), backward.tensors[0].item()) == (1, 12)


@dataclasses.dataclass(frozen=True)
class Part:
    """A virtual stage made of the phases it is given."""

    phases: list[Any]


class Checked:
    """A phase that demands the values of its own virtual stage and microbatch: a mixed-up message
    is noticed."""

    stream = "compute"
    name = "checked"

    def __init__(self, virtual_stage: int, order: list[int]) -> None:
        self.place = order.index(virtual_stage)

    def forward(self, inputs: Any, context: MicrobatchContext) -> Any:
        assert inputs[0].flatten()[0].item() == context.key[1] + 100 * self.place
        return (inputs[0].reshape(2, 1).float() + 100,), context.key

    def backward(self, record: Key, grads: Any, context: MicrobatchContext) -> Any:
        assert record == context.key
        gradient = torch.full((2, 1), 1000.0 * self.place + context.key[1])
        if grads[0] is not None:
            assert torch.equal(grads[0], gradient + 1000)
        assert context.weight_grads is not None
        context.weight_grads.put(context.key, Counted(context.key))
        return (gradient,)


@dataclasses.dataclass(frozen=True)
class Counted:
    """A put-off weight gradient: one for each microbatch of a virtual stage."""

    key: Key
    tensors: tuple[torch.Tensor, ...] = ()

    def accumulate(self, sink: Any) -> None:
        sink.add(self.key)


class Sink:
    """Notes in which order weight gradients came."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def add(self, key: Any) -> None:
        self.keys.append(key)


def stage_of(schedule: Schedule, messages: Messages, stage: int, world: World, sink: Any) -> PipelineStage:
    order = list(range(len(schedule.placement)))
    models = {v: Part([Checked(v, order)]) for v, place in enumerate(schedule.placement) if place == stage}
    channels = build_channels(messages, range(world.size), world)
    transport = PipelineTransport(channels, 1, torch.float32, torch.device("cpu"))
    return PipelineStage(models, build_routes(schedule, stage), transport, sink, CPU)


@pytest.mark.parametrize(
    ("kind", "pp", "vpp", "microbatches"),
    [
        ("gpipe", 3, 1, 4),
        ("1f1b", 2, 1, 1),
        ("interleaved_1f1b", 2, 2, 3),
        ("k2", 2, 2, 6),
        ("k2", 3, 2, 7),
        ("k2", 4, 3, 2),
        ("zb_h1", 4, 1, 6),
    ],
)
def test_messages_meet_their_microbatch_and_each_weight_gradient_is_taken_once(
    kind: Any, pp: int, vpp: int, microbatches: int
) -> None:
    paired = kind == "k2"
    schedule = build_schedule(
        ScheduleSpec(
            pp=pp,
            num_microbatches=microbatches,
            kind=kind,
            vpp=vpp,
            extra_warmup_microbatches=int(paired),
            pair_forward_backward=paired,
            split_weight_grad=kind in ("k2", "zb_h1"),
        )
    )
    validate(schedule)
    messages = plan_messages(schedule)

    def run(world: World) -> tuple[list[Key], list[int]]:
        sink, done = Sink(), []
        stage = stage_of(schedule, messages, world.rank, world, sink)
        inputs = StepInputs(
            tokens=lambda m: torch.full((1, 2), float(m)),
            num_rows=2,
            make_context=lambda v, m: MicrobatchContext(
                num_sequences=1, key=(v, m), weight_grads=stage.queue
            ),
            num_microbatches=microbatches,
            weight_gradients_done=done.append,
        )
        with stage.step(inputs):
            run_actions(schedule.stages[world.rank], stage)
        return sink.keys, done

    for rank, (keys, done) in enumerate(run_threads(pp, run)):
        mine = [v for v, place in enumerate(schedule.placement) if place == rank]
        assert sorted(keys) == [(v, m) for v in mine for m in range(microbatches)]
        # Announced once each, with the last of the virtual stage's weight gradients.
        assert sorted(done) == mine
        assert done == sorted(mine, key=lambda v: max(i for i, key in enumerate(keys) if key[0] == v))


def alone(sink: Any = None) -> PipelineStage:
    stage = PipelineStage({0: Part([Checked(0, [0])])}, {0: Route(0, None, None, 0, 0)}, None, sink, CPU)
    context = lambda v, m: MicrobatchContext(num_sequences=1, key=(v, m), weight_grads=stage.queue)  # noqa: E731
    stage.begin_step(StepInputs(lambda m: torch.full((1, 2), float(m)), 2, context, 1))
    return stage


def test_a_forward_without_its_backward_is_noticed_at_the_end() -> None:
    stage = alone(PlainGradients())
    run_actions(parse_line("F0.0"), stage)
    with pytest.raises(AssertionError, match=r"left under way.*records"):
        stage.finish_step()
    stage.abandon_step()
    stage.finish_step()


def test_a_weight_gradient_never_taken_is_noticed_at_the_end() -> None:
    stage = alone(Sink())
    run_actions(parse_line("F0.0 I0.0"), stage)
    with pytest.raises(AssertionError, match="never taken"):
        stage.finish_step()
    stage.abandon_step()
    stage.finish_step()


def test_evaluation_keeps_nothing() -> None:
    stage = alone(None)
    run_actions(parse_line("F0.0"), stage)
    stage.finish_step()


def test_a_step_that_fails_leaves_nothing_under_way() -> None:
    stage = PipelineStage({0: Part([Checked(0, [0])])}, {0: Route(0, None, None, 0, 0)}, None, Sink(), CPU)
    context = lambda v, m: MicrobatchContext(num_sequences=1, key=(v, m), weight_grads=stage.queue)  # noqa: E731
    inputs = StepInputs(lambda m: torch.full((1, 2), float(m)), 2, context, 1)
    with pytest.raises(KeyError), stage.step(inputs):
        run_actions(parse_line("F0.0 I0.1"), stage)
    with stage.step(inputs):
        run_actions(parse_line("F0.0 I0.0 W0.0"), stage)
