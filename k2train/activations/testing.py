"""A simulated device for tests: queues that run later, in random order, as streams do.

Whatever the queues' own order and their waits leave open is drawn at random: a queue may lag far behind the others or run
ahead of them. So a wait that is missing shows up as a wrong value, on a machine without a device. Memory is poisoned
where a device would reuse it: a host buffer after its copy back, new device memory until something is copied into it.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable

import torch

from k2train.activations.copies import Queue

FREED_BYTE = 0xFF
OTHERS_BYTE = 0xEE


@dataclasses.dataclass(eq=False)
class SimulatedEvent:
    """An event; `tick` is the simulated time at which it came."""

    queue: Queue
    come: bool = False
    tick: int = 0


class SimulatedCopies:
    """The `Copies` of the simulated device.

    seed: of the order. eager_compute: compute is not queued but happens in the caller, as with CPU tensors; copies lag
    behind until compute waits for them. Otherwise compute is what `compute` was given, queued like the rest.
    """

    def __init__(self, seed: int, eager_compute: bool) -> None:
        self._random = random.Random(seed)
        self._eager_compute = eager_compute
        self._queues: dict[Queue, deque[SimulatedEvent | Callable[[], object]]] = {
            "compute": deque(),
            "out": deque(),
            "back": deque(),
        }
        self._weights: dict[Queue, float] = {}
        self._ticks = 0

    def empty(self, num_bytes: int) -> torch.Tensor:
        memory = torch.full((num_bytes,), FREED_BYTE, dtype=torch.uint8)
        if not self._eager_compute:
            # the block's last owner freed it with a kernel still queued, which the allocator allows within a queue
            self.compute(lambda: memory.fill_(OTHERS_BYTE))
        return memory

    def mark(self, queue: Queue) -> SimulatedEvent:
        event = SimulatedEvent(queue, come=queue == "compute" and self._eager_compute, tick=self._ticks)
        if not event.come:
            self._queues[queue].append(event)
        return event

    def wait(self, queue: Queue, event: SimulatedEvent) -> None:
        if queue == "compute" and self._eager_compute:
            self._run_until(lambda: event.come)
        else:
            self._queues[queue].append(_Wait(event))

    def copy_out(self, host: torch.Tensor, source: torch.Tensor) -> None:
        self._queues["out"].append(lambda: host.copy_(source))

    def copy_back(self, target: torch.Tensor, host: torch.Tensor) -> None:
        def copy() -> None:
            target.copy_(host)
            host.fill_(FREED_BYTE)

        self._queues["back"].append(copy)

    def let_go(self, target: torch.Tensor) -> None:
        pass  # the queued copy holds it

    def seconds_between(self, start: SimulatedEvent, stop: SimulatedEvent) -> float:
        self._run_until(lambda: stop.come)
        return float(stop.tick - start.tick)

    def compute(self, kernel: Callable[[], object]) -> None:
        """Queue a kernel on compute."""
        assert not self._eager_compute, "compute is not queued where it is eager"
        self._queues["compute"].append(kernel)

    def advance(self, num_items: int) -> None:
        """Let the device run so many items, or as many as there are."""
        self._weights = {queue: self._random.choice([0.01, 1.0, 100.0]) for queue in self._queues}
        for _ in range(num_items):
            if not self._run_one():
                return

    def finish(self) -> None:
        """Let the device run until all queues are empty."""
        self._run_until(lambda: not any(self._queues.values()))

    def _run_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.advance(self._random.randint(1, 8))
            assert condition() or self._runnable(), "the queues wait for one another"

    def _runnable(self) -> list[Queue]:
        return [
            queue
            for queue, items in self._queues.items()
            if items and not (isinstance(items[0], _Wait) and not items[0].event.come)
        ]

    def _run_one(self) -> bool:
        queues = self._runnable()
        if not queues:
            return False
        queue = self._random.choices(queues, [self._weights[q] for q in queues])[0]
        item = self._queues[queue].popleft()
        self._ticks += 1
        if isinstance(item, SimulatedEvent):
            item.come, item.tick = True, self._ticks
        else:
            item()
        return True


@dataclasses.dataclass(frozen=True, eq=False)
class _Wait:
    """An item that holds up its queue until the event has come."""

    event: SimulatedEvent

    def __call__(self) -> None:
        assert self.event.come
