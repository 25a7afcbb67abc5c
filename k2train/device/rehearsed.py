"""A device that exists in name only: it keeps streams apart, notes every wait of the host, and
answers reads from a list.

Tensors on it have shapes and no memory (torch's FakeTensor), so a copy moves nothing and an event
has always come. What the host would read from the device has no value here; `answers` gives one.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from k2train.device.protocol import Device, Event, HostPages, Priority, Reading, Stream

_HERE = str(Path(__file__).parent)
Answers = Callable[[str, int], list[float]]
"""The numbers of a read: its name and how many there are."""


class RehearsedEvent(Event):
    """Has come. moment: of the device's clock, when it was recorded."""

    def __init__(self, device: RehearsedDevice, stream: str) -> None:
        self._device, self._stream, self._moment = device, stream, device.clock()

    def wait_host(self) -> None:
        self._device.note_host_wait(f"event of {self._stream}", self._moment)

    def seconds_since(self, earlier: Event) -> float:
        self.wait_host()
        return 0.0


class RehearsedStream(Stream):
    """A queue that runs nothing."""

    def __init__(self, device: RehearsedDevice, name: str) -> None:
        self.name, self._device = name, device

    def record(self) -> RehearsedEvent:
        return RehearsedEvent(self._device, self.name)

    def wait(self, *events: Event | None) -> None:
        """Every event has come."""

    def wait_host(self) -> None:
        self._device.note_host_wait(f"stream {self.name}", self._device.clock())

    @contextlib.contextmanager
    def issue(self) -> Iterator[None]:
        with self._device.issuing_to(self):
            yield

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self.issue():
            target.copy_(source, non_blocking=True)

    def uses(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            self._device.note_use(tensor, self)


class RehearsedReading(Reading):
    """Numbers that were made up."""

    def __init__(self, device: RehearsedDevice, what: str, numbers: list[float]) -> None:
        self._device, self._what, self._numbers, self._moment = device, what, numbers, device.clock()

    def wait(self) -> list[float]:
        self._device.note_host_wait(self._what, self._moment)
        return self._numbers


class _Pages:
    """Host memory that nobody gives."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes = torch.zeros(num_bytes, dtype=torch.uint8)


class RehearsedDevice(Device):
    """host_waits: how often the host would have stood still, by what it waited for and the line
    that did."""

    def __init__(self, torch_device: torch.device, answers: Answers) -> None:
        self._torch_device, self._answers = torch_device, answers
        self._issuing = [RehearsedStream(self, "main")]
        self.host_waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.on_use: Callable[[torch.Tensor, str], None] = lambda tensor, stream: None
        self.clock: Callable[[], int] = lambda: 0
        self.on_host_wait: Callable[[str, int], None] = lambda what, moment: None

    @property
    def torch_device(self) -> torch.device:
        return self._torch_device

    @property
    def current(self) -> RehearsedStream:
        return self._issuing[-1]

    def stream(self, name: str, priority: Priority = "normal") -> RehearsedStream:
        return RehearsedStream(self, name)

    def pages(self, num_bytes: int) -> HostPages:
        return _Pages(num_bytes)

    def start_read(self, tensor: torch.Tensor, what: str) -> RehearsedReading:
        return RehearsedReading(self, what, self._answers(what, tensor.numel()))

    def read(self, tensor: torch.Tensor, what: str) -> list[float]:
        return self.start_read(tensor, what).wait()

    def synchronize(self) -> None:
        self.note_host_wait("device", self.clock())

    def peak_bytes(self) -> int:
        return 0

    @contextlib.contextmanager
    def issuing_to(self, stream: RehearsedStream) -> Iterator[None]:
        """Operations called inside go to this stream."""
        self._issuing.append(stream)
        try:
            yield
        finally:
            self._issuing.pop()

    def note_host_wait(self, what: str, moment: int) -> None:
        """The host would stand still here until the device has done what was issued before a
        moment."""
        self.host_waits[what, calling_line()] += 1
        self.on_host_wait(what, moment)

    def note_use(self, tensor: torch.Tensor, stream: RehearsedStream) -> None:
        """A stream reads memory of another's."""
        self.on_use(tensor, stream.name)


def calling_line() -> str:
    """file:line of the innermost caller outside this room, from the package on."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    return f"{short_path(frame.f_code.co_filename)}:{frame.f_lineno}"


def short_path(path: str) -> str:
    """A path from its package on: parallel/relay_route.py."""
    return path.rsplit("/k2train/", 1)[-1]
