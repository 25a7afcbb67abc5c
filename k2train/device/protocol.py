"""The protocol of a device: streams that run in order, events between them, pinned memory, reads by
the host.

What is issued to one stream runs in the order it was issued in. Streams run beside each other
unless one waits for an event of another. The host waits only in `Event.wait_host`,
`Stream.wait_host`, `Reading.wait`, `Device.read` and `Device.synchronize`, so that every host wait
of a step can be counted, and named by its line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal, Protocol

import torch

Priority = Literal["normal", "high"]


class Event(Protocol):
    """A point in a stream: it comes when everything issued to that stream before it is done."""

    def wait_host(self) -> None:
        """Return when the event has come."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """Seconds on the device between two events of a device built with `timed`; waits for this
        one."""
        ...


class Stream(Protocol):
    """A queue of the device. `name` is for reports and profiles."""

    name: str

    def record(self) -> Event:
        """An event behind what the stream has been given so far."""
        ...

    def wait(self, *events: Event | None) -> None:
        """What is issued to this stream from now on starts after the events. None has already
        come."""
        ...

    def wait_host(self) -> None:
        """Return when the stream has done all it was given."""
        ...

    def issue(self) -> contextlib.AbstractContextManager[None]:
        """Operations called inside go to this stream. New tensors belong to it: see `uses`."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy on this stream. The host goes on at once where host memory is pinned.

        The allocator learns nothing of it: the caller keeps both tensors until another stream or
        the host has waited for the copy, or says `uses`.
        """
        ...

    def uses(self, *tensors: torch.Tensor) -> None:
        """The tensors' memory is not handed out again before this stream has done what it has been
        given so far.

        To be said of a tensor that another stream allocated and that may be dropped before that
        stream has waited for this one.
        """
        ...


class Reading(Protocol):
    """Numbers on their way to the host."""

    def wait(self) -> list[float]:
        """The numbers; the host waits for them here, and for nothing issued after them."""
        ...


class HostPages(Protocol):
    """A piece of host memory; freed with the last reference to it."""

    @property
    def bytes(self) -> torch.Tensor:
        """All of it, uint8, one dimension, zero when new. A view must not outlive the piece."""
        ...


class Device(Protocol):
    """One device, seen by the rank that computes on it."""

    page_bytes: int = 1
    """A size of `pages` that is no multiple of this wastes the rest of its last page."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def current(self) -> Stream:
        """The stream that operations are issued to at this place in the program; the main stream
        unless inside `issue`."""
        ...

    def stream(self, name: str, priority: Priority = "normal") -> Stream:
        """A new stream. One that carries communication has high priority, so that its few blocks
        are placed first."""
        ...

    def pages(self, num_bytes: int) -> HostPages:
        """Host memory of exactly this size (> 0) that copies can reach by themselves.

        Raises OSError or RuntimeError where the system gives or locks no more. To lock memory takes
        milliseconds and may stop the device, so it belongs before the first step.
        """
        ...

    def empty(self, num_bytes: int) -> torch.Tensor:
        """New device memory, uint8, one dimension, of the current stream.

        Kernels that were issued to that stream before may still use it: another stream that is to
        write it waits for an event recorded after this call.
        """
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """A copy of a small host tensor, for the current stream; the host need not wait for it."""
        return host.to(self.torch_device)

    def start_read(self, tensor: torch.Tensor, what: str) -> Reading:
        """Begin to bring a tensor's numbers to the host, behind what the current stream has been
        given so far.

        what: names the read in reports, for example "route".
        """
        ...

    def read(self, tensor: torch.Tensor, what: str) -> list[float]:
        """`start_read` and its wait: the host stands still until the device has come so far."""
        ...

    def synchronize(self) -> None:
        """Return when every stream is idle."""
        ...

    def peak_bytes(self) -> int:
        """The most memory used since the start: of the device, or of the process where that is the
        same."""
        ...


def integers(numbers: Sequence[float]) -> list[int]:
    """What a read of an integer tensor brought, as integers; exact below 2^53."""
    return [int(number) for number in numbers]
