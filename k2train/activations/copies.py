"""Three queues of a device: compute, copies out to the host, copies back; and events between them.

This is all the offload engine knows of a device, so that its own logic runs and is tested without one. `HostCopies` does
everything at once, `CudaCopies` queues on streams, and `k2train.activations.testing.SimulatedCopies` queues in a
simulated device that runs its queues in random order.
"""

from __future__ import annotations

import time
from typing import Any, Literal, Protocol

import torch

Queue = Literal["compute", "out", "back"]


class Copies(Protocol):
    """Host and device tensors are uint8, one dimension, contiguous. An event is opaque: only its maker reads it."""

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Device memory that the compute queue may have been using until now: other queues wait for it first."""
        ...

    def mark(self, queue: Queue) -> Any:
        """An event that comes when all that is in the queue now is done."""
        ...

    def wait(self, queue: Queue, event: Any) -> None:
        """What enters the queue from now on starts after the event."""
        ...

    def copy_out(self, host: torch.Tensor, source: torch.Tensor) -> None:
        """Queue on "out". The source's memory is not used for anything else before the copy is over, referenced or not."""
        ...

    def copy_back(self, target: torch.Tensor, host: torch.Tensor) -> None:
        """Queue on "back". The caller keeps the target until compute has waited for the copy, or calls `let_go`."""
        ...

    def let_go(self, target: torch.Tensor) -> None:
        """The target of a copy back is dropped though compute never waited for that copy. Any thread may call it."""
        ...

    def seconds_between(self, start: Any, stop: Any) -> float:
        """Device time between two events of one queue; waits for the second."""
        ...


class HostCopies:
    """No device: a copy is over when the call returns, and an event is the time it was made."""

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def mark(self, queue: Queue) -> float:
        return time.perf_counter()

    def wait(self, queue: Queue, event: float) -> None:
        pass

    def copy_out(self, host: torch.Tensor, source: torch.Tensor) -> None:
        host.copy_(source)

    def copy_back(self, target: torch.Tensor, host: torch.Tensor) -> None:
        target.copy_(host)

    def let_go(self, target: torch.Tensor) -> None:
        pass

    def seconds_between(self, start: float, stop: float) -> float:
        return stop - start


class CudaCopies:
    """A stream for each direction, as each has a copy engine of its own; compute is whatever stream is current.

    Memory that is copied back belongs to the stream that is current at `empty`. Compute waits for the copy before it reads
    it, so it needs no `record_stream` in the normal course, and memory use does not depend on timing there.
    """

    def __init__(self, device: torch.device, timed: bool) -> None:
        self._device = device
        self._timed = timed
        self._out = torch.cuda.Stream(device)
        self._back = torch.cuda.Stream(device)

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def mark(self, queue: Queue) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=self._timed)
        event.record(self._stream(queue))
        return event

    def wait(self, queue: Queue, event: torch.cuda.Event) -> None:
        self._stream(queue).wait_event(event)

    def copy_out(self, host: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._out):
            host.copy_(source, non_blocking=True)
        source.record_stream(self._out)

    def copy_back(self, target: torch.Tensor, host: torch.Tensor) -> None:
        with torch.cuda.stream(self._back):
            target.copy_(host, non_blocking=True)

    def let_go(self, target: torch.Tensor) -> None:
        target.record_stream(self._back)

    def seconds_between(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop) / 1000.0

    def _stream(self, queue: Queue) -> torch.cuda.Stream:
        if queue == "compute":
            return torch.cuda.current_stream(self._device)
        return self._out if queue == "out" else self._back


def build_copies(device: torch.device, timed: bool) -> Copies:
    """The copies of a device. timed: events can be compared by `seconds_between`."""
    return CudaCopies(device, timed) if device.type == "cuda" else HostCopies()
