"""A simulated device for tests: streams that run later, in random order, as those of a GPU may.

Whatever the streams' own order and their waits leave open is drawn at random: a stream may lag far
behind the others or run ahead of them. So a wait that is missing shows up as a wrong value, on a
machine without a device. Memory is poisoned where a device would reuse it:

    host pages      once they were copied to the device, if `pages_read_once`
    new memory      until something is written into it
    freed memory    a copy does not keep the device tensor it reads: dropped without a word of
                    `uses`, it reads as poison
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator

import torch

from k2train.device.host_memory import PageableMemory
from k2train.device.protocol import Device, Event, HostPages, Priority, Reading, Stream

FREED_BYTE = 0xFF
OTHERS_BYTE = 0xEE


class SimulatedEvent(Event):
    """`tick` is the simulated time at which it came."""

    def __init__(self, stream: SimulatedStream, come: bool) -> None:
        self.stream, self.come, self.tick = stream, come, stream.device.ticks

    def wait_host(self) -> None:
        self.stream.device.run_until(lambda: self.come)

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, SimulatedEvent)
        self.wait_host()
        return float(self.tick - earlier.tick)


@dataclasses.dataclass(frozen=True, eq=False)
class _Wait:
    """An item that holds up its stream until the event has come."""

    event: SimulatedEvent

    def __call__(self) -> None:
        assert self.event.come


class SimulatedStream(Stream):
    """A queue of items. eager: what is issued happens at once, and waiting means to let the others
    run."""

    def __init__(self, device: SimulatedDevice, name: str, eager: bool) -> None:
        self.device, self.name, self.eager = device, name, eager
        self.items: deque[SimulatedEvent | Callable[[], object]] = deque()

    def record(self) -> SimulatedEvent:
        event = SimulatedEvent(self, come=self.eager)
        if not self.eager:
            self.items.append(event)
        return event

    def wait(self, *events: Event | None) -> None:
        for event in events:
            if event is None:
                continue
            assert isinstance(event, SimulatedEvent)
            if self.eager:
                event.wait_host()
            else:
                self.items.append(_Wait(event))

    def wait_host(self) -> None:
        self.device.run_until(lambda: not self.items)

    @contextlib.contextmanager
    def issue(self) -> Iterator[None]:
        """Operations inside happen at once, so the stream first has to come so far; see
        `SimulatedDevice.compute`."""
        self.wait_host()
        with self.device.at(self):
            yield

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        read = self.device.reader(source)
        spent = self.device.pages_read_once and self.device.is_host(source)

        def run() -> None:
            found = read()
            if found is None:
                fill(target, FREED_BYTE)
                return
            target.copy_(found)
            if spent:
                fill(found, FREED_BYTE)

        self.issue_item(run)

    def uses(self, *tensors: torch.Tensor) -> None:
        self.issue_item(lambda: tensors)

    def issue_item(self, item: Callable[[], object]) -> None:
        """Run an item when the stream has come to it."""
        if self.eager:
            item()
        else:
            self.items.append(item)


@dataclasses.dataclass(frozen=True)
class SimulatedReading(Reading):
    """Numbers that are there when the event has come."""

    arrived: SimulatedEvent
    numbers: list[float]

    def wait(self) -> list[float]:
        self.arrived.wait_host()
        return self.numbers


class SimulatedDevice(Device):
    """seed: of the order. eager_compute: the main stream is not queued but happens in the caller,
    as with CPU tensors; the others lag behind until somebody waits for them. Otherwise the main
    stream is what `compute` was given, queued like the rest. pages_read_once: nobody reads host
    pages again after their copy to the device.
    """

    stream_type: type[SimulatedStream] = SimulatedStream

    def __init__(self, seed: int, eager_compute: bool, pages_read_once: bool = False) -> None:
        self.pages_read_once = pages_read_once
        self._random = random.Random(seed)
        self._main = self.stream_type(self, "main", eager_compute)
        self._current = self._main
        self._streams: list[SimulatedStream] = [self._main]
        self._weights: dict[SimulatedStream, float] = {}
        self._host: set[int] = set()
        self.ticks = 0

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def current(self) -> SimulatedStream:
        return self._current

    @contextlib.contextmanager
    def at(self, stream: SimulatedStream) -> Iterator[None]:
        """`stream` is the current one inside."""
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def stream(self, name: str, priority: Priority = "normal") -> SimulatedStream:
        self._streams.append(self.stream_type(self, name, eager=False))
        return self._streams[-1]

    def pages(self, num_bytes: int) -> HostPages:
        pages = PageableMemory(num_bytes)
        storage = pages.bytes.untyped_storage()
        self._host.add(id(storage))
        weakref.finalize(storage, self._host.discard, id(storage))
        return pages

    def is_host(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in host pages that were made here."""
        return id(tensor.untyped_storage()) in self._host

    def empty(self, num_bytes: int) -> torch.Tensor:
        memory = torch.full((num_bytes,), FREED_BYTE, dtype=torch.uint8)
        if not self._main.eager:
            # The block's last owner freed it with a kernel still queued, which the allocator allows
            # within a stream.
            self.compute(lambda: memory.fill_(OTHERS_BYTE))
        return memory

    def start_read(self, tensor: torch.Tensor, what: str) -> SimulatedReading:
        numbers: list[float] = []
        self._current.issue_item(lambda: numbers.extend(tensor.flatten().tolist()))
        return SimulatedReading(self._current.record(), numbers)

    def read(self, tensor: torch.Tensor, what: str) -> list[float]:
        return self.start_read(tensor, what).wait()

    def synchronize(self) -> None:
        self.run_until(lambda: not any(stream.items for stream in self._streams))

    def peak_bytes(self) -> int:
        return 0

    def compute(self, kernel: Callable[[], object]) -> None:
        """Issue a kernel to the current stream."""
        self._current.issue_item(kernel)

    def advance(self, num_items: int) -> None:
        """Let the device run so many items, or as many as there are."""
        self._weights = {stream: self._random.choice([0.01, 1.0, 100.0]) for stream in self._streams}
        for _ in range(num_items):
            if not self._run_one():
                return

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Let the device run until the condition holds, and perhaps a little further."""
        while not condition():
            self.advance(self._random.randint(1, 8))
            assert condition() or self._runnable(), "the streams wait for one another"

    def reader(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        """Gives the tensor, or None where it was on the device and nobody has kept it. Holds host
        memory only."""
        if self.is_host(tensor):
            return lambda: tensor
        storage = weakref.ref(tensor.untyped_storage())
        dtype, where = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

        def read() -> torch.Tensor | None:
            found = storage()
            return None if found is None else torch.empty(0, dtype=dtype).set_(found, *where)

        return read

    def _runnable(self) -> list[SimulatedStream]:
        return [
            stream
            for stream in self._streams
            if stream.items and not (isinstance(stream.items[0], _Wait) and not stream.items[0].event.come)
        ]

    def _run_one(self) -> bool:
        streams = self._runnable()
        if not streams:
            return False
        stream = self._random.choices(streams, [self._weights[s] for s in streams])[0]
        item = stream.items.popleft()
        self.ticks += 1
        if isinstance(item, SimulatedEvent):
            item.come, item.tick = True, self.ticks
        else:
            item()
        return True


def fill(tensor: torch.Tensor, byte: int) -> None:
    """Overwrite every byte of a tensor without gaps."""
    tensor.view(torch.uint8).fill_(byte)
