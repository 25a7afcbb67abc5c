"""The stream that exchanges go on, beside the main one.

An exchange waits for the moment its inputs were ready, not for whatever else the main stream has
been given meanwhile; the simulator counts on that (schedule/simulate.py). Its results are handed on
with a moment of their own, so that the main stream waits where it computes with them and nowhere
else. Collectives of NCCL that are started here wait for this stream alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from k2train.device.protocol import Device, Event
from k2train.model.dispatcher import Results, RouteTables, Tensors


class SideStream:
    """One stream of a device. What is issued to it runs in the order it was issued in.

    All exchanges of a rank share one, so that ranks start their collectives in one order. Its
    priority is high: a collective needs few blocks, and the sooner they are placed the sooner every
    other rank goes on.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._stream = device.stream("dispatch", priority="high")
        self._fetching = device.stream("route tables")

    @contextlib.contextmanager
    def issue(self, inputs: Tensors, ready: Event | None) -> Iterator[None]:
        """Operations called inside go to the stream, behind the event `ready` (None: behind all
        that the current stream has been given). They may read the inputs, whoever allocated
        them."""
        self._stream.wait(self.device.current.record() if ready is None else ready)
        with self._stream.issue():
            yield
        # The allocator must not hand the memory out again before the side stream has read it.
        self._stream.uses(*inputs)

    def start(self, work: Callable[..., Tensors], inputs: Tensors, ready: Event | None = None) -> Results:
        """work(*inputs), issued as by `issue`."""
        with self.issue(inputs, ready):
            results = work(*inputs)
        return Results(results, self._stream.record())

    def tables(self, tables: RouteTables) -> Tensors:
        """A route's tables, for the side stream and the current one to read from here on.

        They may be on their way back from host memory. A store lets the stream that asks first wait
        for the copy and takes it as arrived for all, so a stream without other work asks, and both
        wait for it.
        """
        with self._fetching.issue():
            tensors = tuple(tables)
        arrived = self._fetching.record()
        self._stream.wait(arrived)
        self.device.current.wait(arrived)
        self._stream.uses(*tensors)
        return tensors
