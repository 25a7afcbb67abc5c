"""A CPU as a device: one queue, and whatever is issued has happened when the call returns."""

from __future__ import annotations

import contextlib
import resource
import time

import torch

from k2train.device.host_memory import PageableMemory
from k2train.device.protocol import Device, Event, HostPages, Priority, Reading, Stream

CPU = torch.device("cpu")


class CpuEvent(Event):
    """The moment it was made, which has come."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def wait_host(self) -> None:
        """Has come."""

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, CpuEvent)
        return self._time - earlier._time


class CpuStream(Stream):
    """A name for the one queue."""

    def __init__(self, name: str) -> None:
        self.name = name

    def record(self) -> CpuEvent:
        return CpuEvent()

    def wait(self, *events: Event | None) -> None:
        """Every event has come."""

    def wait_host(self) -> None:
        """All is done."""

    def issue(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def uses(self, *tensors: torch.Tensor) -> None:
        """Has used them."""


class CpuReading(Reading):
    """Numbers that are on the host already."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = numbers

    def wait(self) -> list[float]:
        return self._numbers


class CpuDevice(Device):
    """The host's own memory and arithmetic."""

    def __init__(self, torch_device: torch.device = CPU) -> None:
        self._torch_device = torch_device
        self._main = CpuStream("main")

    @property
    def torch_device(self) -> torch.device:
        return self._torch_device

    @property
    def current(self) -> CpuStream:
        return self._main

    def stream(self, name: str, priority: Priority = "normal") -> CpuStream:
        return CpuStream(name)

    def pages(self, num_bytes: int) -> HostPages:
        return PageableMemory(num_bytes)

    def start_read(self, tensor: torch.Tensor, what: str) -> CpuReading:
        return CpuReading(tensor.flatten().tolist())

    def read(self, tensor: torch.Tensor, what: str) -> list[float]:
        return self.start_read(tensor, what).wait()

    def synchronize(self) -> None:
        """All is done."""

    def peak_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
