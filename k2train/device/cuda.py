"""A CUDA device. Not yet run on a GPU since this room was made."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

import torch

from k2train.device.host_memory import PinnedMemory
from k2train.device.protocol import Device, Event, HostPages, Priority, Reading, Stream


class CudaEvent(Event):
    """A torch.cuda.Event."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait_host(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, CudaEvent)
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1000.0


class CudaStream(Stream):
    """A torch.cuda.Stream. timed: its events can be compared."""

    def __init__(self, name: str, stream: torch.cuda.Stream, timed: bool) -> None:
        self.name, self._stream, self._timed = name, stream, timed

    def record(self) -> CudaEvent:
        event = torch.cuda.Event(enable_timing=self._timed)
        event.record(self._stream)
        return CudaEvent(event)

    def wait(self, *events: Event | None) -> None:
        for event in events:
            if event is not None:
                assert isinstance(event, CudaEvent)
                self._stream.wait_event(event.event)

    def wait_host(self) -> None:
        self._stream.synchronize()

    @contextlib.contextmanager
    def issue(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def uses(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor.record_stream(self._stream)


class CudaReading(Reading):
    """A copy into pinned memory, and the event behind it. The device tensor is kept until the copy
    is over."""

    def __init__(self, device_numbers: torch.Tensor, host_numbers: torch.Tensor, arrived: CudaEvent) -> None:
        self._device_numbers, self._host_numbers, self._arrived = device_numbers, host_numbers, arrived

    def wait(self) -> list[float]:
        self._arrived.wait_host()
        return self._host_numbers.tolist()


class CudaDevice(Device):
    """One GPU. timed: events can be compared by `seconds_since`."""

    page_bytes = mmap.PAGESIZE
    # CUDA's lowest number is its highest priority; torch knows two.
    _PRIORITY = {"normal": 0, "high": -1}  # noqa: RUF012

    def __init__(self, torch_device: torch.device, timed: bool = False) -> None:
        self._torch_device, self._timed = torch_device, timed

    @property
    def torch_device(self) -> torch.device:
        return self._torch_device

    @property
    def current(self) -> CudaStream:
        return CudaStream("current", torch.cuda.current_stream(self._torch_device), self._timed)

    def stream(self, name: str, priority: Priority = "normal") -> CudaStream:
        return CudaStream(
            name, torch.cuda.Stream(self._torch_device, priority=self._PRIORITY[priority]), self._timed
        )

    def pages(self, num_bytes: int) -> HostPages:
        return PinnedMemory(num_bytes)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        # torch keeps the pinned copy until the stream has read it.
        return host.pin_memory().to(self._torch_device, non_blocking=True)

    def start_read(self, tensor: torch.Tensor, what: str) -> CudaReading:
        numbers = tensor.detach().flatten()
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        return CudaReading(numbers, host, self.current.record())

    def read(self, tensor: torch.Tensor, what: str) -> list[float]:
        return self.start_read(tensor, what).wait()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._torch_device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._torch_device)
