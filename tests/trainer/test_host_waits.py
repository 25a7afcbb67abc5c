"""How often the host stands still for the device in a training step: as often as docs/design.md
says, and nowhere else.

The device counts. On a CPU nothing else tells a wait from an ordinary read; that no read goes past
the device is shown by `k2train rehearse`, where a tensor has no numbers to be read.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from k2train.architecture.layer import layer_kind
from k2train.config.compose import load_config
from k2train.device.cpu import CpuDevice, CpuEvent, CpuReading, CpuStream
from k2train.model.context import Statistics
from k2train.schedule.actions import Kind, Pair
from k2train.trainer.batch import read_batch
from k2train.trainer.build import Run
from k2train.trainer.step import run_schedule, train_step
from k2train.trainer.testing import run_on_ranks

_HALVES = {Kind.F: 1, Kind.I: 1, Kind.W: 1, Kind.B: 2}


class CountingReading(CpuReading):
    def __init__(self, numbers, waits, what) -> None:
        super().__init__(numbers)
        self.waits, self.what = waits, what

    def wait(self):
        self.waits[self.what] += 1
        return super().wait()


class CountingEvent(CpuEvent):
    def __init__(self, waits, name) -> None:
        super().__init__()
        self.waits, self.name = waits, name

    def wait_host(self) -> None:
        self.waits[f"event of {self.name}"] += 1


class CountingStream(CpuStream):
    def __init__(self, name, waits) -> None:
        super().__init__(name)
        self.waits = waits

    def record(self):
        return CountingEvent(self.waits, self.name)

    def wait_host(self) -> None:
        self.waits[self.name] += 1


class CountingDevice(CpuDevice):
    """Counts what the host waits for, by name."""

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self.waits: Counter[str] = Counter()

    @property
    def current(self):
        return CountingStream("main", self.waits)

    def stream(self, name, priority: str = "normal"):
        return CountingStream(name, self.waits)

    def start_read(self, tensor, what):
        return CountingReading(tensor.flatten().tolist(), self.waits, what)

    def synchronize(self) -> None:
        self.waits["device"] += 1


def waits_of_a_step(run: Run) -> tuple[Counter[str], int, int]:
    """Of the second step, and how many forwards of MoE layers and how many compute steps it has on
    this rank."""
    train_step(run, read_batch(run, 0))
    run.device.waits.clear()
    train_step(run, read_batch(run, 1))
    layers = sum(
        layer_kind(run.config.model, layer) == "moe"
        for model in run.models.values()
        for layer in model.part.layers
    )
    return Counter(run.device.waits), layers * run.num_microbatches, compute_steps(run)


def compute_steps(run: Run) -> int:
    """Of the rank's action list: a pair is one, a full backward two."""
    steps = run.schedule.stages[run.pp_rank]
    return sum(1 if isinstance(step, Pair) else _HALVES.get(step.kind, 0) for step in steps)


LAYOUTS = [
    ["layout.vpp=3", "schedule=k2"],
    ["layout.pp=2", "layout.ep=2", "schedule=k2", "model.num_hidden_layers=4"],
    ["schedule=1f1b"],
]


@pytest.mark.parametrize("activations", ["none", "k2"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_a_step_waits_once_for_its_numbers_and_once_for_each_route_and_compute_step(
    words, layout, activations: str
) -> None:
    """The optimizer, QK-Clip, the totals, FP8 storage and offload add nothing to that."""
    config = load_config([*words, f"activations={activations}", *layout])
    for waits, routes, steps in run_on_ranks(config, waits_of_a_step, make_device=CountingDevice):
        assert waits == Counter({"step": 1, "route": routes, "event of main": steps})


def test_host_states_add_a_wait_for_every_piece_of_gradient_and_one_for_the_copies_of_the_last_step(
    words,
) -> None:
    config = load_config([*words, "optim.states=host", "optim.qk_clip_tau=1e9"])
    ((waits, routes, steps),) = run_on_ranks(config, waits_of_a_step, make_device=CountingDevice)
    assert waits.pop("event of gradients out") > 0
    drains = {"states in": 1, "states out": 1, "gradients out": 1}
    assert waits == Counter({"step": 1, "route": routes, "event of main": steps, **drains})


def test_a_schedule_alone_waits_for_routes_and_for_compute_steps_long_issued(words) -> None:
    def waits(run: Run) -> Counter[str]:
        run_schedule(run, read_batch(run, 0), Statistics())
        return Counter(run.device.waits)

    (found,) = run_on_ranks(load_config(words), waits, make_device=CountingDevice)
    assert set(found) == {"route", "event of main"}
